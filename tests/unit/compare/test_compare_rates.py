"""The search for a rate, with losses that are planted: what it tries, what it takes, and what it leaves alone."""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from gelora_plugins.compare.rates import FACTOR, FURTHEST, Choice, choose, cliff_runs, next_runs, rounded

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (1000, 1001, 1002, 1003, 1004)
Found = dict[float, dict[int, float]]
BEYOND = 0.01  # of a run beyond the cliff: a loss just above that of the constant answer


def searched(
    loss: Callable[[float, int], float], grid: Sequence[float] = GRID, seeds: Sequence[int] = SEEDS
) -> tuple[Choice, Found]:
    """The choice where a run's loss, less that of the constant answer, is loss(rate, seed); and what was run."""
    found: Found = {}
    while runs := next_runs(found, grid, seeds):
        assert len(set(runs)) == len(runs)
        for rate, seed in runs:
            assert seed not in found.get(rate, {}), "no run is made twice"
            found.setdefault(rate, {})[seed] = loss(rate, seed)
        assert sum(map(len, found.values())) < 300
    return choose(found, seeds), found


def valley(best: float, depth: float = 1.2, bend: float = 0.3) -> Callable[[float], float]:
    """As measured on docstrings: 0.1 above the lowest loss at a factor of 1.8."""
    return lambda rate: min(bend * math.log(rate / best) ** 2 - depth, 0.02)


def noisy(rng: np.random.Generator, best: float, cliff: float, noise: float) -> Callable[[float, int], float]:
    """Losses of seeds: a level of each seed, and noise of each run; chance from the cliff on."""
    level, curve = dict(zip(SEEDS, rng.normal(0, 0.1, len(SEEDS)), strict=True)), valley(best)
    return lambda rate, seed: BEYOND if rate >= cliff else curve(rate) + level[seed] + rng.normal(0, noise)


@pytest.mark.parametrize("noise", [0.03, 0.06])
def test_the_choice_is_near_the_best_rate_and_never_beyond_the_cliff(noise: float) -> None:
    """Noise of 0.06 is that of a run with 100 held-out rows: the means of two neighbours differ by half of it."""
    rng = np.random.default_rng(0)
    near = []
    for _ in range(60):
        best = math.exp(rng.uniform(math.log(1e-4), math.log(3e-2)))
        cliff = best * math.exp(rng.uniform(-0.5, 2.0))  # it may lie below the valley's floor
        choice, found = searched(noisy(rng, best, cliff, noise))
        assert choice.rate is not None
        assert choice.rate < cliff
        best = min(best, cliff)
        near.append(max(choice.rate / best, best / choice.rate) <= FACTOR)
        assert sum(map(len, found.values())) <= 45
    assert np.mean(near) >= 0.95


def test_without_noise_the_rate_is_within_a_step_of_the_best() -> None:
    for best in np.geomspace(1e-5, 0.3, 25):
        choice, found = searched(lambda rate, seed, best=best: valley(best)(rate))
        assert choice.rate is not None
        assert max(choice.rate / best, best / choice.rate) < math.sqrt(FACTOR)
        assert not choice.at_edge
        assert len(choice.near) == 2
        assert all(max(r / choice.rate, choice.rate / r) <= FACTOR for r in choice.near)
        assert all(set(found[rate]) == set(SEEDS) for rate in (choice.rate, *choice.near))


def test_seeds_are_spent_near_the_best_rate() -> None:
    _, found = searched(lambda rate, seed: valley(2e-3)(rate))
    assert {rate: len(found[rate]) for rate in (3e-4, 1e-2)} == {3e-4: 1, 1e-2: 1}
    assert sum(map(len, found.values())) < 26


def test_a_rate_beyond_the_cliff_gets_no_more_seeds() -> None:
    choice, found = searched(lambda rate, seed: BEYOND if rate > 5e-3 else valley(4e-3)(rate))
    assert all(len(losses) <= 2 for rate, losses in found.items() if rate > 5e-3)
    assert choice.cliff == min(rate for rate in found if rate > 5e-3)
    assert choice.stable == max(rate for rate in found if rate <= 5e-3)
    assert max(choice.near) < 5e-3


@pytest.mark.parametrize("cliff", [6e-3, 0.05, math.inf])
def test_where_runs_diverge_is_found_with_one_seed(cliff: float) -> None:
    def loss(rate: float, seed: int) -> float:
        return BEYOND if rate > cliff else valley(4e-3, bend=0.02)(rate)

    choice, found = searched(loss)
    before = sum(map(len, found.values()))
    while runs := cliff_runs(found, GRID, SEEDS):
        for rate, seed in runs:
            found.setdefault(rate, {})[seed] = loss(rate, seed)
        assert not next_runs(found, GRID, SEEDS)
    after = choose(found, SEEDS)
    assert after.rate == choice.rate
    assert after.stable is not None
    assert sum(map(len, found.values())) - before <= 6
    if cliff == math.inf:
        assert after.cliff is None
        assert after.stable > 0.3
    else:
        assert after.stable <= cliff < (after.cliff or 0) <= 2 * after.stable


def planted(above: float, below: float) -> Choice:
    """Three rates below a cliff, all seeds: the losses of the middle one -1, of the others these."""
    spread = (-0.1, -0.05, 0.0, 0.05, 0.1)
    rates = {1e-3: (below,) * 5, 1.3e-3: (-1.0,) * 5, 1.7e-3: tuple(above + s for s in spread), 2.2e-3: (BEYOND,)}
    return choose({r: dict(zip(SEEDS, losses, strict=False)) for r, losses in rates.items()}, SEEDS)


def test_next_to_a_cliff_the_rate_below_is_taken_where_it_is_as_good_within_noise() -> None:
    choice = planted(above=-1.02, below=-0.9)
    assert choice.rate == 1.3e-3
    assert choice.why == "0.0017 is not better beyond noise, and next to 0.0022, where seeds diverge"
    assert choice.near == (1e-3, 1.7e-3)


def test_next_to_a_cliff_the_better_rate_is_taken_where_that_is_more_than_noise() -> None:
    choice = planted(above=-1.2, below=-0.8)
    assert (choice.rate, choice.why) == (1.7e-3, "")
    assert choice.near == (1.3e-3,), "not the one beyond the cliff"


def test_one_diverged_seed_of_five_is_a_cliff() -> None:
    def loss(rate: float, seed: int) -> float:
        return math.inf if rate > 5e-3 and seed == 1003 else valley(8e-3)(rate)

    choice, _ = searched(loss)
    assert choice.rate is not None
    assert choice.rate < 5e-3
    assert choice.cliff is not None


def test_a_rate_that_is_too_low_to_learn_is_no_cliff() -> None:
    """There losses lie about that of the constant answer, on either side."""
    choice, _ = searched(lambda rate, seed: valley(5e-3)(rate) if rate > 5e-4 else (-0.001 if rate < 2e-4 else 0.001))
    assert choice.rate is not None
    assert choice.rate > 3e-3
    assert choice.cliff is None


def test_where_nothing_learns_there_is_no_rate() -> None:
    for loss in (BEYOND, math.inf):
        choice, found = searched(lambda rate, seed, loss=loss: loss)
        assert choice.rate is None
        assert choice.why == f"No rate from {min(found):g} to {max(found):g} learned with every seed"


def test_where_nothing_of_the_grid_learns_what_lies_beyond_is_tried() -> None:
    choice, _ = searched(lambda rate, seed: valley(1e-4)(rate) if rate < 2e-4 else 0.5 + rate)
    assert choice.rate is not None
    assert choice.rate < 2e-4


def test_a_loss_that_falls_for_ever_ends_at_an_edge_and_is_said_to() -> None:
    choice, _ = searched(lambda rate, seed: -1 - math.log(rate / 1e-9))
    assert choice.rate is not None
    assert choice.rate * 3 > max(GRID) * FURTHEST
    assert choice.at_edge


def test_what_could_as_well_have_been_chosen() -> None:
    _, clear = searched(lambda rate, seed: valley(3e-3, bend=2.0)(rate))
    assert choose(clear, SEEDS).as_good == ()
    rng = random.Random(0)
    flat, _ = searched(lambda rate, seed: valley(3e-3, bend=0.02)(rate) + rng.gauss(0, 0.05))
    assert flat.as_good
    assert set(flat.as_good) <= set(flat.near)


def test_with_one_seed_any_neighbour_could_have_been_chosen() -> None:
    choice, found = searched(lambda rate, seed: valley(3e-3)(rate), seeds=SEEDS[:1])
    assert len(choice.near) == 2
    assert choice.as_good == choice.near
    assert {len(losses) for losses in found.values()} == {1}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_search_ends_whatever_is_found(count: int) -> None:
    rng = random.Random(count)
    for _ in range(30):
        ways = [lambda rate, seed: rng.choice([-1.0, -0.5, 0.1, math.inf]), lambda rate, seed: rng.uniform(-1, 0.2)]
        grid = sorted(rounded(10 ** rng.uniform(-5, -1)) for _ in range(rng.randint(2, 5)))
        choice, found = searched(rng.choice(ways), grid, SEEDS[:count])
        for rate in (choice.rate, *choice.near):
            assert rate is None or (len(found[rate]) == count and max(found[rate].values()) < 0)
