"""What could be won by moving ranks: which allocations are drawn, what their scores come to, what is said of it."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gelora_plugins.compare.allocations import headroom_group, plan_group, random_allocations
from gelora_plugins.compare.bench import Settings
from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.findings.headroom import Allocation, Headroom, expected_largest, two_way_layout
from gelora_plugins.findings.record import Run
from gelora_plugins.findings.summary import Comparison
from gelora_plugins.ranks.plan import Site
from tests.support.comparing import SETTINGS, compare_tiny, result, save_model, valley
from tests.support.plans import make_plan

ALIKE = tuple(Site(f"layers.{i}", 56) for i in range(3))
UNLIKE = (Site("a", 8, 4), Site("b", 12, 3), Site("c", 8, 2), Site("d", 20, 9))
BUDGET = replace(SETTINGS, allocations=("uniform",), methods=("lora",), headroom=8, seeds=3)


def all_of(total: int, sites: tuple[Site, ...], most: int) -> set[tuple[int, ...]]:
    """By trying everything."""
    ranges = (range(1, min(site.most(1), most) + 1) for site in sites)
    costs = [site.parameters_per_rank for site in sites]
    return {r for r in itertools.product(*ranges) if sum(a * b for a, b in zip(r, costs, strict=True)) == total}


# Which are drawn


@pytest.mark.parametrize(("ranks", "sites"), [((2, 2, 2), ALIKE), ((3, 3, 2, 2), UNLIKE), ((1, 1, 1), ALIKE)])
def test_every_allocation_at_that_cost_can_be_drawn_and_no_other(
    ranks: tuple[int, ...], sites: tuple[Site, ...]
) -> None:
    total = sum(rank * site.parameters_per_rank for rank, site in zip(ranks, sites, strict=True))
    drawn = random_allocations(ranks, sites, 1000, base_rank=1)
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == all_of(total, sites, 10)


def test_allocations_are_drawn_alike_often() -> None:
    """Ten exist. Of 2,000 single draws each comes to 200, with a standard deviation of 13.4: within 5 of those."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2000):
        (drawn,) = random_allocations((2, 2, 2), ALIKE, 1, base_rank=1, seed=seed)
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 10
    assert max(abs(count - 200) for count in counts.values()) < 5 * 13.4


def test_a_draw_is_that_of_its_seed_and_many_ranks_are_no_trouble() -> None:
    sites = tuple(Site(f"layers.{i}", 56, 512) for i in range(48))
    drawn = random_allocations((64,) * 48, sites, 20, base_rank=64)
    assert drawn == random_allocations((64,) * 48, sites, 20, base_rank=64)
    assert len(set(drawn)) == 20
    assert {sum(ranks) for ranks in drawn} == {64 * 48}
    assert drawn != random_allocations((64,) * 48, sites, 20, base_rank=64, seed=1)


def test_where_few_allocations_exist_that_is_a_note() -> None:
    group, notes = headroom_group("mine", 56 * 4, 5, ALIKE, base_rank=2)
    assert group is not None
    assert [arm.name for arm in group.arms] == ["uniform", "random 1", "random 2", "random 3"]
    assert group.name == "headroom of mine"
    assert notes == ("headroom of mine: 3 allocations exist, not 5.",)
    assert headroom_group("mine", 56 * 3, 5, ALIKE, base_rank=2) == (
        None,
        ("headroom of mine: 1 allocations exist, not 5.",),
    )


def test_a_plan_cannot_have_the_name_of_a_group_of_random_allocations() -> None:
    with pytest.raises(ConfigError, match="A plan is called 'headroom of mine'"):
        plan_group("headroom of mine", make_plan(), ("plan",), ["lora"], 3)


@pytest.mark.parametrize("options", [{"headroom": 2}, {"headroom": 3, "seeds": 1}, {"headroom": -1}])
def test_too_few_to_have_a_spread_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 3 random allocations and 2 seeds"):
        Settings(**options)


@pytest.mark.parametrize("options", [{"allocations": ("grid",)}, {"methods": ("eva",)}])
def test_without_uniform_ranks_there_is_no_rate_to_take(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="headroom needs uniform among the allocations and lora"):
        Settings(headroom=5, **options)


# What scores come to


def layout(
    rng: np.random.Generator, sd: float, count: int = 18, seeds: int = 5, mean: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of allocations, and of uniform: luck of 1, seeds that differ by 3."""
    of_seed = 3 * rng.normal(size=seeds)
    effects = mean + sd * rng.normal(size=(count, 1))
    return effects + of_seed + rng.normal(size=(count, seeds)), of_seed + rng.normal(size=seeds)


def test_the_expected_largest_of_few_draws_is_that_of_the_tables() -> None:
    assert expected_largest(1) == pytest.approx(0, abs=1e-8)
    assert expected_largest(2) == pytest.approx(np.pi**-0.5)
    assert expected_largest(3) == pytest.approx(1.5 * np.pi**-0.5)
    assert expected_largest(18) == pytest.approx(1.8200, abs=1e-4)  # Harter 1961


def test_the_interval_of_the_spread_leaves_zero_where_the_f_test_does() -> None:
    rng, told = np.random.default_rng(0), set()
    for sd in np.linspace(0, 1, 41):
        scores, uniform = layout(rng, float(sd))
        found = two_way_layout(scores.tolist(), uniform.tolist())
        rest = scores - scores.mean(1)[:, None] - scores.mean(0) + scores.mean()
        ratio = 5 * scores.mean(1).var(ddof=1) / ((rest**2).sum() / 68)
        p = stats.f.sf(ratio, 17, 68)
        assert (found.sd_interval[0] > 0) == (p < 0.025)
        assert found.sd_interval[0] <= found.sd <= found.sd_interval[1]
        assert found.kept == pytest.approx(max(0.0, 1 - 1 / ratio))
        told.add(bool(p < 0.025))
    assert told == {True, False}


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    """The standard error of 95 % of 300 is 1.3 %; the record in benchmarks/ has many more."""
    rng, held = np.random.default_rng(0), []
    best = expected_largest(18) * 0.7 - 0.5
    for _ in range(300):
        found = two_way_layout(*layout(rng, 0.7, mean=-0.5))
        ends = ((0.7, found.sd_interval), (-0.5, found.mean_interval), (best, found.gain_interval))
        held.append([low <= true <= high for true, (low, high) in ends])
    assert np.mean(held, axis=0) == pytest.approx([0.95] * 3, abs=0.04)


def test_on_a_null_task_next_to_nothing_is_said_to_be_there() -> None:
    rng = np.random.default_rng(0)
    won = [two_way_layout(*layout(rng, 0.0)).gain_interval[0] > 0 for _ in range(300)]
    assert np.mean(won) <= 0.05


def test_allocations_that_fall_off_are_no_reason_to_believe_in_better_ones() -> None:
    """Two of 18 are worse by 4, all others as uniform: their sd is that of a task where 2.2 could be won."""
    rng, won = np.random.default_rng(0), []
    for _ in range(100):
        scores, uniform = layout(rng, 0.0)
        scores[:2] -= 4
        found = two_way_layout(scores.tolist(), uniform.tolist())
        assert found.sd_interval[0] > 0
        won.append(found.gain_interval[0] > 0)
    assert np.mean(won) <= 0.05


def test_the_upper_end_is_not_below_an_allocation_that_is_shown_to_be_better() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(100):
        scores, uniform = layout(rng, 0.0)
        scores[0] += 4
        found = two_way_layout(scores.tolist(), uniform.tolist())
        held.append(0 < found.gain_interval[0] <= 4 <= found.gain_interval[1])
    assert np.mean(held) >= 0.9


def test_scores_without_any_spread_are_no_division_by_zero() -> None:
    found = two_way_layout([[0.1, 0.2, 0.7]] * 4, [0.1, 0.2, 0.7])
    assert (found.sd, found.sd_interval, found.gain_interval, found.kept) == (0, (0, 0), (0, 0), 0)
    apart = two_way_layout([[1.0 + i, 2.0 + i] for i in range(4)], [1.0, 2.0])  # no luck at all
    assert apart.sd == pytest.approx(np.std(range(4), ddof=1))
    assert apart.sd_interval == pytest.approx(tuple(apart.sd * np.sqrt(3 / stats.chi2.ppf((0.975, 0.025), 3))))
    assert apart.kept == 1


def drawn(scores: list[list[float | None]], metric: str = "accuracy", margin: float = 0.0) -> Headroom:
    """Made-up allocations; the first scores are of uniform ranks."""
    arms = [Allocation(f"random {i}" if i else "uniform", (2, 2), tuple(s)) for i, s in enumerate(scores)]
    return Headroom("tiny", "mine", metric, 100, 1e-3, margin, arms[0], tuple(arms[1:]), {})


def test_of_losses_less_is_better() -> None:
    scores: list[list[float | None]] = [[1.0, 1.1], [0.5, 0.61], [0.9, 1.0], [1.2, 1.3], [1.0, 1.12]]
    of_loss = drawn(scores, "loss")
    of_score = drawn([[None if s is None else -s for s in of_arm] for of_arm in scores])
    assert of_loss.layout == of_score.layout
    assert max(of_loss.gains(), key=lambda gain: gain[1])[0].name == "random 1"
    assert list(of_loss.cells())[1][:4] == ("random 1", "2, 2", "0.555", "+0.495")


def test_what_is_within_the_margin_is_nothing() -> None:
    scores: list[list[float | None]] = [[70.0, 71.0], [70.5, 71.1], [70.1, 71.3], [69.9, 70.8], [70.2, 71.2]]
    assert "at most" in drawn(scores).verdict
    assert "; that anything can is not shown" in drawn(scores).verdict
    assert drawn(scores, margin=50).verdict.endswith("or no more than the margin of 50")


def test_diverged_seeds_are_named_and_never_averaged() -> None:
    scores: list[list[float | None]] = [[70.0, 71.0], [70.5, None], [70.1, 71.3], [69.9, 70.8], [70.2, 71.2]]
    found = drawn(scores)
    assert found.layout == drawn([*scores[:1], *scores[2:]]).layout
    assert str(found).endswith("Left out: random 1 (1 of 2 seeds diverged).")
    assert list(found.cells())[-1] == ("random 1", "2, 2", "1 of 2 seeds diverged", "", "")
    assert "no verdict" in drawn(scores[:4]).verdict
    assert "no verdict" in str(drawn([[None, 71.0], *scores[2:]]))
    assert "uniform (1 of 2 seeds diverged)" in str(drawn([[None, 71.0], *scores[2:]]))


# In a comparison


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


Make = Callable[..., Comparison]


@pytest.fixture
def made(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`made(score, settings)`: the comparison of those scores, in tmp_path; a score in words is why a run failed."""

    def make(score: Any, settings: Settings = BUDGET) -> Comparison:
        def attempt(bench: Any, run: Run, threads: Any = None) -> Any:
            found = score(run)
            return found if isinstance(found, str) else result(run, found, valley(run))

        monkeypatch.setattr("gelora_plugins.compare.run.attempt", attempt)
        return compare_tiny(model, tmp_path, settings)

    return make


def luck(run: Run) -> float:
    """Of a seed, and of a seed with an allocation: up to 0.3 points."""
    return 0.01 * run.seed + 0.0005 * ((31 * run.seed + 7 * run.recipe.ranks[0] + 13 * run.recipe.ranks[1]) % 7 - 3)


def planted(run: Run) -> float:
    """Each rank of the last block is worth two points."""
    return 0.5 + 0.02 * run.recipe.ranks[-1] + luck(run)


def test_a_planted_effect_of_the_allocation_is_found(made: Make, tmp_path: Path) -> None:
    found = made(planted)
    (headroom,) = found.headrooms
    assert headroom.row == "r = 4"
    assert len(headroom.allocations) == 8
    best, over, shrunken = max(headroom.gains(), key=lambda gain: gain[1])
    assert best.ranks[-1] == max(a.ranks[-1] for a in headroom.allocations)
    assert over == pytest.approx(2 * (best.ranks[-1] - 4), abs=0.6)  # luck is at most 0.3 for each of the two
    assert 0 < shrunken <= over
    assert headroom.layout is not None
    low, high = headroom.layout.gain_interval
    assert 0 < low < over < high
    (line,) = [line for line in found.lines() if line.startswith("tiny, headroom of r = 4: at 1,536 LoRA parameters")]
    assert f"at most {high:.2g} can be won by moving ranks between blocks, and at least {low:.2g} (95 %" in line
    assert "Random allocations at the cost of r = 4, 1,536:" in found.to_markdown()
    assert all(f"| {' | '.join(cells)} |" in found.to_markdown() for cells in headroom.cells())
    recorded = json.loads(found.write(tmp_path / "out")[0].read_text(encoding="utf-8"))["headroom"]
    assert [a["ranks"] for a in recorded[0]["allocations"]] == [list(a.ranks) for a in headroom.allocations]
    assert recorded[0]["layout"]["gain_interval"] == [low, high]


def test_on_a_null_task_nothing_can_be_won(made: Make) -> None:
    (same,) = made(lambda run: 0.5 + 0.01 * run.seed).headrooms
    assert same.verdict == "nothing can be won by moving ranks between blocks"


def test_luck_alone_shows_nothing_and_bounds_what_can_be_won(made: Make) -> None:
    (found,) = made(lambda run: 0.5 + luck(run)).headrooms
    assert found.verdict.endswith("; that anything can is not shown")
    assert found.layout is not None
    assert found.layout.gain_interval[1] < 1, "luck is at most 0.3 points"


def test_random_allocations_are_no_methods(made: Make) -> None:
    """Neither a contrast, which would be corrected for, nor a line of the main table."""
    with_them, settings = made(planted), replace(BUDGET, headroom=0)
    without = made(planted, settings)
    assert with_them.results == without.results
    assert with_them.contrasts == without.contrasts
    assert not without.headrooms


def test_all_have_the_rate_of_uniform_ranks_and_nothing_is_trained_twice(made: Make, tmp_path: Path) -> None:
    made(planted)
    lines = [json.loads(line) for line in (tmp_path / "tiny" / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    of_them = [line for line in lines if line["method"].startswith("random")]
    (uniform,) = made(planted).results
    assert len(of_them) == 8 * 3
    assert {(line["rate"], line["choosing"]) for line in of_them} == {(uniform.rate, False)}
    assert sum(line["method"] == "uniform" and not line["choosing"] for line in lines) == 3 * (1 + len(uniform.around))
    assert len((tmp_path / "tiny" / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == len(lines)


def test_they_follow_uniform_ranks_to_a_lower_rate(made: Make) -> None:
    """Where the seeds that judge diverge at the rate that was chosen, which is next to 3e-3."""
    found = made(lambda run: None if run.rate > 2e-3 and not run.choosing else planted(run))
    (uniform,), (headroom,) = found.results, found.headrooms
    assert uniform.diverged.startswith("3 of 3 seeds diverged at 0.00")
    assert headroom.rate == uniform.rate < 2e-3
    assert None not in headroom.uniform.scores


def test_each_plan_has_its_own_and_what_is_not_done_is_said(made: Make, tmp_path: Path) -> None:
    found = made(planted, replace(BUDGET, allocations=("plan", "uniform")))
    assert [headroom.row for headroom in found.headrooms] == ["mine"]
    path = tmp_path / "tiny" / "runs.jsonl"
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:-2]) + "\n", encoding="utf-8")
    again = Comparison.read(tmp_path)
    assert not again.headrooms
    (gap,) = again.gaps
    assert gap.unfinished
    assert str(gap).startswith("tiny: headroom of mine: 2 of 27 runs are not done.")


def test_an_allocation_that_cannot_be_trained_is_named(made: Make) -> None:
    (found,) = made(lambda run: "out of memory" if run.method == "random 2" else planted(run)).headrooms
    assert [a.name for a in found.whole] == [f"random {i}" for i in (1, 3, 4, 5, 6, 7, 8)]
    assert "Left out: random 2 (seed 0 at the rate" in str(found)
    assert [name for name, _, score, *_ in found.cells() if score == "failed"] == ["random 2"]


def test_a_damaged_record_is_named(made: Make, tmp_path: Path) -> None:
    made(planted)
    path = tmp_path / "tiny" / "experiment.json"
    experiment = json.loads(path.read_text(encoding="utf-8"))
    experiment["rows"][-1]["methods"][1]["recipes"] = []
    path.write_text(json.dumps(experiment), encoding="utf-8")
    with pytest.raises(PlanError, match="is no record of a comparison: IndexError"):
        Comparison.read(tmp_path)
