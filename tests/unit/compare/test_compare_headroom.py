"""What could be won by moving ranks: what the scores of random allocations come to, and what is said of it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from gelora_plugins import cli
from gelora_plugins.compare.bench import Settings
from gelora_plugins.errors import PlanError
from gelora_plugins.findings.headroom import Allocation, Headroom, expected_largest, two_way_layout
from gelora_plugins.findings.record import Run
from gelora_plugins.findings.summary import Comparison
from tests.support.comparing import SETTINGS, compare_tiny, result, rows, said, save_model, valley

BUDGET = replace(SETTINGS, allocations=("uniform",), methods=("lora",), headroom=8, seeds=3)


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


@pytest.mark.parametrize(("count", "seeds"), [(4, 2), (3, 5)])
def test_the_error_of_the_mean_is_that_of_both_layouts(count: int, seeds: int) -> None:
    """Allocations are a draw, so their mean squares count. With two seeds both have as many degrees of freedom."""
    scores, uniform = layout(np.random.default_rng(0), 1.0, count, seeds)
    found = two_way_layout(scores.tolist(), uniform.tolist())
    rest = scores - scores.mean(1)[:, None] - scores.mean(0) + scores.mean()
    within = (count - 1) * (seeds - 1)
    of_arms, of_rest = scores.mean(1).var(ddof=1) / count, (rest**2).sum() / within / seeds
    freedom = (of_arms + of_rest) ** 2 / (of_arms**2 / (count - 1) + of_rest**2 / within)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(of_arms + of_rest)
    mean = scores.mean() - uniform.mean()
    assert found.mean_interval == pytest.approx((mean - half, mean + half))


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


def test_the_command_has_the_option(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gelora_plugins.compare.run.attempt", said(planted))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(60, 0)), encoding="utf-8")
    options = "--task classification --allocations uniform --methods lora --rates 1e-3 --rank 4 --seeds 2 --headroom 3"
    command = ["gelora", "compare", model, str(data), *options.split(), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, "--target-modules", SETTINGS.target_modules])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "rows, headroom of r = 4: at 1,536 LoRA parameters at most" in capsys.readouterr().out
