"""Estimators where there is next to nothing to estimate: what is said, and what is left out rather than made up."""

import math
from typing import Any

import pytest
import torch

from gelora_plugins.dimension import estimators
from gelora_plugins.dimension.estimators import twonn_mle
from gelora_plugins.errors import DimensionError


def gaussian(count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(0))


def test_errors_are_whole_sentences() -> None:
    with pytest.raises(DimensionError, match=r"^Some points coincide; expected distinct points\.$"):
        twonn_mle(torch.cat([gaussian(60), gaussian(60)[:1]]))
    message = r"^The nearest neighbours of most points are equally far; there is no dimension then\.$"
    with pytest.raises(DimensionError, match=message):
        twonn_mle(torch.eye(60))


def test_few_points_have_a_dimension_and_no_error_of_it() -> None:
    found = twonn_mle(gaussian(estimators.MIN_POINTS - 1))
    assert (found.num_points, found.std_error, found.replicates) == (estimators.MIN_POINTS - 1, None, ())
    assert twonn_mle(gaussian(estimators.MIN_POINTS)).std_error is not None


def test_a_dimension_below_one_has_an_error() -> None:
    """Cantor's set, whose dimension is log 2 / log 3: 0.63."""
    digits = torch.randint(0, 2, (300, 12), generator=torch.Generator().manual_seed(0)).double()
    points = (2 * digits / 3 ** torch.arange(1, 13)).sum(1, keepdim=True).unique(dim=0)
    found = twonn_mle(points.float())
    assert 0 < found.value < 1
    assert max(found.replicates) < 1
    assert found.std_error is not None


@pytest.mark.parametrize("of_a_half", [math.nan, math.inf, -1e9])
def test_a_half_without_a_dimension_leaves_no_error(monkeypatch: pytest.MonkeyPatch, of_a_half: float) -> None:
    original = twonn_mle.from_distances
    calls: list[Any] = []

    def from_distances(distances: torch.Tensor) -> torch.Tensor:
        calls.append(distances)
        value = original(distances)
        if len(calls) == 2:  # the first is of all points
            value.view(-1)[0] = of_a_half
        return value

    found = estimators.NeighbourEstimator(2, from_distances)(gaussian(200))
    assert (found.std_error, found.interval, found.replicates) == (None, None, ())
    assert found.value == pytest.approx(twonn_mle(gaussian(200)).value)


def test_a_dimension_of_0_is_none() -> None:
    flat = estimators.NeighbourEstimator(2, lambda distances: torch.zeros(distances.shape[:-2], dtype=torch.float64))
    with pytest.raises(DimensionError, match="equally far"):
        flat(gaussian(200))


def test_gride_looks_at_twice_as_many_neighbours_as_its_scale() -> None:
    assert [estimators.gride_at(scale).num_neighbours for scale in (1, 2, 8)] == [2, 4, 16]
