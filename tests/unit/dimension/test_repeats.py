"""Which points repeat others."""

import numpy as np
import pytest
import torch

from gelora_plugins.dimension.neighbours import repeats
from tests.support.points import gaussian, nearest


def test_the_first_of_each_group_of_repeats_is_kept():
    a, b, c = gaussian(3, 8)
    points = torch.stack([a, b, a, c, b + 1e-7, a, b])
    repeated, found = repeats(points, nearest)
    assert repeated.tolist() == [False, False, True, False, True, True, True]
    assert torch.equal(found.distances, nearest(torch.stack([a, b, c])).distances)


def test_a_group_of_near_repeats_larger_than_the_list_leaves_one():
    points = gaussian(100, 8)
    points[10:70] = points[10] + 1e-8 * gaussian(60, 8, seed=1)
    assert repeats(points, nearest)[0].nonzero().flatten().tolist() == list(range(11, 70))


@pytest.mark.parametrize(("distance", "repeated"), [(0.95e-5, True), (1.05e-5, False)])
def test_repeats_are_nearer_than_a_hundred_thousandth_of_the_spread(distance, repeated):
    points = gaussian(1000, 4) + 100
    spread = np.quantile(np.linalg.norm(points - np.median(points, axis=0), axis=1), 0.95)
    near = points[7] + distance * spread * torch.tensor([0.6, 0.0, -0.8, 0.0])
    assert repeats(torch.cat([points, near[None]]), nearest)[0].tolist() == [*[False] * 1000, repeated]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_repeats_do_not_depend_on_the_unit_and_the_dtype_of_the_points(scale, dtype):
    points = gaussian(100, 8)
    points[60:70] = points[:10] * (1 + 1e-7)
    assert repeats((points * scale).to(dtype), nearest)[0].nonzero().flatten().tolist() == list(range(60, 70))


@pytest.mark.parametrize("value", [0.0, 0.1, 5000.0])
def test_points_that_all_coincide_are_all_repeats_of_the_first(value):
    repeated, found = repeats(torch.full((5, 3), value), nearest)
    assert repeated.tolist() == [False, True, True, True, True]
    assert found is None


@pytest.mark.parametrize("distance", [1e7, 1e12])
def test_repeats_do_not_depend_on_a_few_points_far_away(distance):
    points = gaussian(100, 8)
    points[60:70] = points[:10] + 1e-7
    points[90:93] += distance * gaussian(3, 8, seed=1)
    assert repeats(points, nearest)[0].nonzero().flatten().tolist() == list(range(60, 70))


def test_nine_tenths_that_nearly_coincide_are_repeats():
    points = gaussian(100, 8)
    points[10:] = points[10] + 1e-8 * gaussian(90, 8, seed=1)
    assert repeats(points, nearest)[0].nonzero().flatten().tolist() == list(range(11, 100))


def test_equal_points_cost_no_search():
    points = gaussian(100, 8)
    points[50:] = points[:50]
    searched = []
    repeats(points, lambda rest: searched.append(len(rest)) or nearest(rest))
    assert searched == [50]


def test_one_point_has_no_repeats():
    assert repeats(torch.ones(1, 3), nearest)[0].tolist() == [False]


@pytest.mark.parametrize(("options", "enough"), [({}, 2), ({"least": 5}, 5)])
def test_fewer_points_than_asked_for_are_not_searched(options, enough):
    repeated, found = repeats(gaussian(enough, 3), nearest, **options)
    assert found is not None
    assert not repeated.any()
    repeated, found = repeats(gaussian(enough, 3)[1:], nearest, **options)
    assert found is None
    assert not repeated.any()


def test_points_without_equal_rows_are_searched_as_they_are():
    points, searched = gaussian(20, 3), []
    repeats(points, lambda some: searched.append(some) or nearest(some))
    assert searched[0] is points, "a copy of the points of a large model is large"
