"""What each test row adds to a score: its mean is the score, and its spread that of the score over draws of rows."""

import numpy as np
import pytest

from gelora_plugins.compare.metrics import SCORES, parts_of


def answers(metric: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if metric == "spearman":
        labels = rng.normal(size=count)
        return labels + rng.normal(size=count), labels
    labels = rng.integers(0, 2, count)
    return np.where(rng.random(count) < 0.8, labels, 1 - labels), labels


@pytest.mark.parametrize("metric", SCORES)
def test_the_mean_of_the_parts_is_the_score(metric: str) -> None:
    given, true = answers(metric, 60)
    assert parts_of(SCORES[metric], given, true).mean() == pytest.approx(SCORES[metric](given, true), abs=1e-12)


def test_of_accuracy_each_right_answer_is_one() -> None:
    parts = parts_of(SCORES["accuracy"], np.array([0, 1, 1]), np.array([0, 0, 1]))
    assert parts.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("metric", SCORES)
def test_one_row_adds_the_whole_score(metric: str) -> None:
    """Left out, it leaves no rows to score."""
    assert parts_of(SCORES[metric], np.array([1]), np.array([1])) == [SCORES[metric](np.array([1]), np.array([1]))]


@pytest.mark.parametrize("metric", ["mcc", "f1", "spearman"])
def test_their_spread_is_that_of_scores_over_draws_of_the_rows(metric: str) -> None:
    """The jackknife's error, on the average over draws, beside the spread of the scores: 200 draws know it to 5 %."""
    drawn = [answers(metric, 80, seed) for seed in range(200)]
    spread = np.std([SCORES[metric](given, true) for given, true in drawn], ddof=1)
    stated = np.mean([parts_of(SCORES[metric], given, true).std(ddof=1) / np.sqrt(80) for given, true in drawn[:40]])
    assert stated == pytest.approx(spread, rel=0.25)


def test_many_rows_of_a_classification_take_no_longer_than_few() -> None:
    """Left out one by one, a hundred thousand rows would be ten thousand million, and a mask of them 10 GB."""
    given, true = answers("f1", 100_000)
    assert parts_of(SCORES["f1"], given, true).mean() == pytest.approx(SCORES["f1"](given, true), abs=1e-9)


@pytest.mark.parametrize("metric", ["mcc", "f1", "spearman"])
def test_parts_are_those_of_rows_left_out_one_by_one(metric: str) -> None:
    given, true = answers(metric, 30)
    score, everyone = SCORES[metric], np.arange(30)
    without = np.array([score(given[everyone != i], true[everyone != i]) for i in everyone])
    expected = score(given, true) + 29 * (without.mean() - without)
    np.testing.assert_allclose(parts_of(score, given, true), expected, atol=1e-12)
