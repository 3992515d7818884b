"""benchmarks/compare/check.py: what of a comparison that was made anew contradicts the recorded one."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.compare.check import at_one_rate, check
from benchmarks.machine import RESULTS
from gelora_plugins.findings.contrasts import contrasts_of
from gelora_plugins.findings.results import Around, Result
from gelora_plugins.findings.summary import Comparison

RECORD = RESULTS / "compare"


@pytest.fixture(scope="module")
def recorded() -> Comparison:
    return Comparison.read(RECORD)


def remade(recorded: Comparison, scores: Callable[[Result], list[float]], task: str = "docstrings") -> Comparison:
    """The recorded comparison of one task with other scores."""
    results = []
    for result in recorded.results:
        if result.task == task:
            made = tuple(scores(result))
            results.append(replace(result, scores=made, mean=float(np.mean(made))))
    return replace(recorded, results=tuple(results), contrasts=tuple(contrasts_of(results, {task: 0.0})))


def test_the_recorded_comparison_says_what_it_says(recorded: Comparison) -> None:
    found, wrong = check(recorded, recorded)
    count = len(recorded.results)
    assert not wrong
    assert found[0].startswith(f"{count} of {count} methods were judged at a recorded rate")


def test_other_draws_of_the_same_scores_are_no_contradiction(recorded: Comparison) -> None:
    """As another processor makes them. Each of the two kinds of test complains in 1 % of remakes, by design."""
    rng = np.random.default_rng(0)
    complaints = 0
    for _ in range(30):
        made = remade(recorded, lambda r: rng.normal(r.mean, np.std(r.scores, ddof=1), len(r.scores)).tolist())
        assert not {r.scores for r in made.results} & {r.scores for r in recorded.results}
        complaints += bool(check(made, recorded)[1])
    assert complaints <= 3, "of 30 at 2 %, more come once in 300 times"


def test_a_score_that_no_spread_explains_is_named(recorded: Comparison) -> None:
    """Ten standard deviations of the seeds, where chance explains five."""

    def scores(result: Result) -> list[float]:
        fall = 10 * float(np.std(result.scores, ddof=1)) if (result.row, result.method) == ("budget", "eva") else 0.0
        return [score - fall for score in result.scores]

    _, wrong = check(remade(recorded, scores), recorded)
    assert wrong
    assert all("eva" in line for line in wrong)
    assert wrong[0].startswith("docstrings, budget, eva: ")
    assert "recorded 69.75" in wrong[0]


def test_a_score_at_another_rate_is_not_compared(recorded: Comparison) -> None:
    """Which of two rates that are nearly as good is best is chance, too."""
    made = replace(recorded, results=tuple(replace(r, rate=2 * r.rate, scores=(0.0,) * 5) for r in recorded.results))
    found, wrong = check(made, recorded)
    assert not wrong
    assert found[0].startswith(f"0 of {len(recorded.results)} methods were judged at a recorded rate")


def test_a_rate_beside_the_chosen_one_is_compared_with_the_recorded_one(recorded: Comparison) -> None:
    was = recorded.results[0]
    beside = Around(was.rate, was.scores, as_good=False)
    moved = replace(was, rate=2 * was.rate, scores=(0.0,) * 5, around=(beside,))
    assert at_one_rate(moved, was) == (was.scores, was.scores)
    assert at_one_rate(was, moved) == (was.scores, was.scores)
    assert at_one_rate(replace(moved, head_rate=1.0), was) is None
    assert at_one_rate(replace(moved, around=(replace(beside, scores=(None, *was.scores[1:])),)), was) is None


def test_a_difference_that_is_told_the_other_way_round_is_named(recorded: Comparison) -> None:
    was = replace(recorded.contrasts[0], verdict="better")
    turned, recorded = replace(was, verdict="worse"), replace(recorded, contrasts=(was,))
    _, (wrong,) = check(replace(recorded, contrasts=(turned,)), recorded)
    assert f"{was.task}, {was.row}: {was.ours} is worse than {was.theirs}" in wrong
    assert "recorded: " in wrong
    assert not check(replace(recorded, contrasts=(replace(was, verdict="not told apart"),)), recorded)[1]


def test_a_part_of_the_comparison_is_enough(recorded: Comparison) -> None:
    part = replace(recorded, results=recorded.results[:2], contrasts=recorded.contrasts[:1])
    found, wrong = check(part, recorded)
    assert not wrong
    assert "of 1 differences have the recorded sign" in found[1]


def test_other_parameters_are_named(recorded: Comparison) -> None:
    result = recorded.results[0]
    made = replace(recorded, results=(replace(result, parameters=1.02 * result.parameters),))
    assert "LoRA parameters, recorded" in check(made, recorded)[1][0]


def test_nothing_in_common_is_an_error(recorded: Comparison) -> None:
    made = replace(recorded, results=(), contrasts=())
    assert check(made, recorded)[1] == ["The two have no method in common."]
