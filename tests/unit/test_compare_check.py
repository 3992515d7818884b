"""benchmarks/compare_check.py: what of a comparison that was made anew contradicts the recorded one."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gelora_plugins.compare_report import Comparison
from gelora_plugins.compare_stats import paired_difference

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from compare_check import check  # noqa: E402


@pytest.fixture(scope="module")
def recorded() -> Comparison:
    return Comparison.read(BENCHMARKS / "results" / "compare")


def test_the_recorded_comparison_says_what_it_says(recorded: Comparison) -> None:
    found, wrong = check(recorded, recorded)
    count = len(recorded.results)
    assert not wrong
    assert found[0] == f"{count} of {count} methods have the recorded scores to the last digit."
    assert (
        found[2]
        == f"{count * (count - 1) // 2} of {count * (count - 1) // 2} pairs of methods stand in the recorded order."
    )


def test_a_part_of_the_comparison_is_enough(recorded: Comparison) -> None:
    part = replace(recorded, results=recorded.results[:2], contrasts=recorded.contrasts[:1])
    found, wrong = check(part, recorded)
    assert not wrong
    assert found[1].startswith("1 of 1 differences have the recorded sign")


def test_a_difference_that_turned_round_is_named(recorded: Comparison) -> None:
    contrast = recorded.contrasts[0]
    better = paired_difference([2.0, 3.1, 4.0], [1.0, 2.0, 3.0])
    worse = paired_difference([1.0, 2.0, 3.0], [2.0, 3.1, 4.0])
    made = replace(recorded, contrasts=(replace(contrast, difference=better, verdict="better"),))
    other = replace(recorded, contrasts=(replace(contrast, difference=worse, verdict="equal within 1"),))
    found, (wrong,) = check(made, other)
    assert not found
    assert f"{contrast.task}, {contrast.row}: {contrast.ours} is better" in wrong
    assert "recorded: " in wrong


def test_other_parameters_are_named(recorded: Comparison) -> None:
    result = recorded.results[0]
    made = replace(recorded, results=(replace(result, parameters=result.parameters + 1),))
    assert "LoRA parameters, recorded" in check(made, recorded)[1][0]


def test_nothing_in_common_is_an_error(recorded: Comparison) -> None:
    made = replace(recorded, results=(), contrasts=())
    assert check(made, recorded)[1] == ["The two have no method in common."]
