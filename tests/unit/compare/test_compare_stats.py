"""The numbers of a comparison: intervals, paired differences, corrections, verdicts, the Pareto front."""

import math

import numpy as np
import pytest
from scipy import stats

from gelora_plugins.findings.stats import (
    Difference,
    holm,
    mean_interval,
    paired_difference,
    pareto,
    smallest_difference,
    two_way,
    verdict,
)


def test_the_interval_of_a_mean_is_students() -> None:
    scores = [80.0, 82.5, 81.0, 79.5, 84.0]
    mean, half = mean_interval(scores)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(scores), scale=stats.sem(scores))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_one_score_has_no_interval() -> None:
    assert mean_interval([81.0]) == (81.0, None)


def test_the_paired_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = []
    for _ in range(300):
        ours, theirs = rng.normal(1.0, 1.0, 5), rng.normal(0.0, 1.0, 5)
        interval = paired_difference(ours, theirs).interval
        assert interval is not None
        held.append(interval[0] <= 1.0 <= interval[1])
    assert 0.92 <= np.mean(held) <= 0.98, "the percentile bootstrap comes to 0.85 here"


def test_pairing_removes_what_the_seeds_share() -> None:
    seeds = np.array([70.0, 90.0, 75.0, 85.0, 80.0])
    raised = seeds + np.array([1.0, 1.2, 0.9, 1.1, 0.8])
    found = paired_difference(raised, seeds)
    assert found.mean == pytest.approx(1.0)
    assert found.p < 0.01
    assert verdict(found, found.p) == "better"
    assert verdict(paired_difference(seeds, raised), found.p) == "worse"


def test_the_same_scores_are_equal_within_nothing() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)
    assert verdict(found, found.p) == "equal within 0"


def test_a_difference_that_cannot_be_told_is_not_called_equal() -> None:
    """Five seeds that vary by 50 would be "equal within 88.7", which says nothing but that nothing was found."""
    found = Difference(mean=0.5, interval=(-87.0, 88.7), p=0.9, smallest=150.0, seeds=5)
    assert verdict(found, 0.9) == "not told apart"
    assert verdict(found, 0.9, margin=88.0) == "not told apart"
    assert verdict(found, 0.9, margin=89.0) == "equal within 88.7"


def test_a_correction_can_take_a_verdict_away() -> None:
    found = Difference(mean=0.5, interval=(0.1, 0.9), p=0.03, smallest=0.5, seeds=5)
    assert verdict(found, 0.03) == "better"
    assert verdict(found, 0.09) == "not told apart"


def test_a_difference_within_the_margin_is_equal_however_sure_it_is() -> None:
    found = Difference(mean=0.5, interval=(0.1, 0.9), p=0.001, smallest=0.5, seeds=5)
    assert verdict(found, 0.001, margin=1.0) == "equal within 0.9"
    assert verdict(found, 0.001, margin=0.8) == "better"


def test_equal_is_what_two_one_sided_tests_say() -> None:
    """Schuirmann 1987, at 2.5 %: the difference is above minus the margin, and below the margin."""
    rng, said = np.random.default_rng(0), set()
    for _ in range(100):
        differences = rng.normal(0.5, 0.5, 6)
        found = paired_difference(differences, np.zeros(6))
        above = stats.ttest_1samp(differences, -1.0, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, 1.0, alternative="less").pvalue
        equal = verdict(found, found.p, margin=1.0).startswith("equal within")
        assert equal == (max(above, below) <= 0.025)
        said.add(equal)
    assert said == {True, False}


def test_two_seeds_give_no_verdict() -> None:
    found = paired_difference([1.0, 2.0], [0.0, 0.0])
    assert verdict(found, found.p) == "no verdict: 2 seeds, at least 3 are needed"


def test_the_paired_interval_is_students() -> None:
    differences = np.random.default_rng(1).normal(0.3, 1.0, 5)
    found = paired_difference(differences, np.zeros(5))
    half = stats.t.ppf(0.975, 4) * stats.sem(differences)
    assert found.interval == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(differences.mean()) / stats.sem(differences), 4))


def test_one_difference_at_every_seed_is_judged_by_its_sign_alone() -> None:
    found = paired_difference([2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.interval, found.p) == (1.0, (1.0, 1.0), 2 / 2**5)


def test_the_smallest_difference_is_found_in_four_of_five_experiments() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(0.0, 1.0, 8)
    sample = (sample - sample.mean()) / sample.std(ddof=1)  # a spread of exactly 1
    drawn = rng.normal(smallest_difference(sample.tolist()), 1.0, (4000, 8))
    assert (stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.03)


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(1, 70.0), (2, 80.0), (4, 75.0), (8, 80.0), (8, 85.0)]
    assert pareto(points) == [0, 1, 4]
    assert pareto([(1, math.pi), (1, math.pi)]) == [0, 1]


def test_the_error_of_a_mean_over_seeds_and_rows_is_that_of_the_layout() -> None:
    """Rows that differ and seeds that do not: the error is that of the rows, as if there were one seed."""
    rows = np.array([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    error, freedom = two_way(np.tile(rows, (4, 1)))
    assert error == pytest.approx(stats.sem(rows))
    assert freedom == 5
    error, freedom = two_way(np.tile(rows[:, None], (1, 7)))
    assert error == pytest.approx(stats.sem(rows))
    assert freedom == 5


def test_there_may_be_as_many_seeds_as_rows() -> None:
    """Seeds and rows then have the same degrees of freedom."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(4, 1)) + rng.normal(size=4) + 0.1 * rng.normal(size=(4, 4))
    rest = table - table.mean(1)[:, None] - table.mean(0) + table.mean()
    squares = 4 * table.mean(1).var(ddof=1), 4 * table.mean(0).var(ddof=1), (rest**2).sum() / 9
    both = squares[0] + squares[1] - squares[2]
    error, freedom = two_way(table)
    assert error == pytest.approx(np.sqrt(both / 16))
    assert freedom == pytest.approx(both**2 / (squares[0] ** 2 / 3 + squares[1] ** 2 / 3 + squares[2] ** 2 / 9))


def test_intervals_hold_the_true_difference_where_test_rows_are_a_draw() -> None:
    """Here the luck of the rows is twice that of the seeds; by seeds alone the interval holds it in about half."""
    rng = np.random.default_rng(1)
    held: list[tuple[bool, bool]] = []
    for _ in range(300):
        parts = rng.normal(0, 2, (5, 1)) + rng.normal(0, 40, 100) + rng.normal(0, 20, (5, 100))
        zeros, scores = np.zeros((5, 100)), parts.mean(1)
        both = paired_difference(scores, [0.0] * 5, (parts, zeros))
        alone = paired_difference(scores, [0.0] * 5)
        assert both.interval is not None
        assert alone.interval is not None
        held.append((both.interval[0] <= 0 <= both.interval[1], alone.interval[0] <= 0 <= alone.interval[1]))
        assert (both.rows, alone.rows) == (100, 0)
    covered = np.mean(held, axis=0)
    assert 0.92 <= covered[0] <= 0.99
    assert covered[1] <= 0.75


@pytest.mark.parametrize(
    "parts",
    [[[0.0, 0.0]] * 3, [[0.5], [0.1], [0.3]], [[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]],
    ids=["all alike", "one row", "means alike"],
)
def test_parts_that_say_nothing_leave_the_seeds(parts: list[list[float]]) -> None:
    """Scores that differ beyond the six digits of a recorded part, and a test set of one row."""
    ours, theirs = [-0.8731, -0.8772, -0.885090605], [-0.8731, -0.8772, -0.885090608]
    found = paired_difference(ours, theirs, (parts, np.zeros_like(parts).tolist()))
    assert found == paired_difference(ours, theirs)
    assert found.interval is not None
    assert 0 < found.p < 1
