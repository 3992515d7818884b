import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import chi2
from skdim.id import TwoNN

from gelora_plugins import estimators
from gelora_plugins.errors import DimensionError
from gelora_plugins.estimators import log_ratios, neighbour_distances, repeats, twonn, twonn_mle
from gelora_plugins.features import PooledFeatures
from gelora_plugins.pipeline import estimate_dimensions
from tests.reference.clean_sets import checksum, clean_sets

REFERENCE = Path(__file__).parents[1] / "reference"
CLEAN = dict(clean_sets())
DADAPY = json.loads((REFERENCE / "dadapy.json").read_text())["sets"]


def gaussian(n, dim, embedding_dim=None, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, dim))
    if embedding_dim:
        points = points @ np.linalg.qr(rng.standard_normal((embedding_dim, dim)))[0].T
    return torch.from_numpy(points)


def brute_force(points, k=2):
    points = points.double().numpy()
    distances = cdist(points, points)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, :k]


# --- against the reference implementations


def test_the_recorded_sets_are_the_generated_ones():
    assert {name: checksum(points) for name, points in CLEAN.items()} == {
        name: figures["checksum"] for name, figures in DADAPY.items()
    }


@pytest.mark.parametrize("name", CLEAN)
def test_twonn_equals_scikit_dimension(name):
    # scikit-dimension takes |x|^2 + |y|^2 - 2xy beyond 25 coordinates, which leaves an error of 1e-13 at most here.
    assert twonn(torch.from_numpy(CLEAN[name])).value == pytest.approx(TwoNN().fit(CLEAN[name]).dimension_, rel=1e-11)


@pytest.mark.parametrize("name", CLEAN)
def test_twonn_equals_dadapy(name):
    # DADApy fits the line by iteration (scipy's curve_fit), which stops up to 2e-9 away from the exact slope.
    assert twonn(torch.from_numpy(CLEAN[name])).value == pytest.approx(DADAPY[name]["twonn"], rel=1e-8)


@pytest.mark.parametrize("name", CLEAN)
def test_twonn_mle_equals_scikit_dimension(name):
    expected = TwoNN(method="mle").fit(CLEAN[name]).dimension_
    assert twonn_mle(torch.from_numpy(CLEAN[name])).value == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("n", [50, 51, 59, 60, 99, 101])
def test_the_number_of_kept_ratios_is_scikit_dimensions_for_every_size(n):
    points = gaussian(n, 4)
    assert twonn(points).value == pytest.approx(TwoNN().fit(points.numpy()).dimension_, rel=1e-11)
    assert twonn_mle(points).value == pytest.approx(TwoNN(method="mle").fit(points.numpy()).dimension_, rel=1e-11)


# --- the interval


def test_the_interval_and_the_standard_error_follow_from_the_chi_squared_law():
    points = gaussian(200, 6)
    r = brute_force(points)
    log_mu = np.sort(np.log(r[:, 1] / r[:, 0]))
    total = log_mu[:180].sum() + 20 * log_mu[179]
    estimate = twonn_mle(points)
    assert estimate.interval == pytest.approx(chi2.ppf([0.025, 0.975], 360) / (2 * total), rel=1e-9)
    assert estimate.value == pytest.approx(179 / total, rel=1e-9)
    assert estimate.std_error == pytest.approx(estimate.value / math.sqrt(178), rel=1e-9)
    assert estimate.num_points == 200


def test_the_mle_is_unbiased_and_its_interval_covers_on_independent_ratios(monkeypatch):
    rng = np.random.default_rng(0)
    dimension, estimates = 7.0, []
    for _ in range(2000):
        log_mu = torch.from_numpy(np.sort(rng.exponential(1 / dimension, 100)))
        monkeypatch.setattr(estimators, "log_ratios", lambda points, log_mu=log_mu: log_mu)
        estimates.append(twonn_mle(torch.empty(0)))
    values = np.array([estimate.value for estimate in estimates])
    covered = np.mean([estimate.interval[0] <= dimension <= estimate.interval[1] for estimate in estimates])
    assert values.mean() == pytest.approx(dimension, rel=0.01)  # four standard errors
    assert values.std() == pytest.approx(np.mean([estimate.std_error for estimate in estimates]), rel=0.06)
    assert covered == pytest.approx(0.95, abs=0.02)


def test_the_linear_fit_claims_no_interval():
    assert twonn(gaussian(100, 3)).interval is None
    assert twonn(gaussian(100, 3)).std_error is None


@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
@pytest.mark.parametrize("dim", [1, 3, 6])
def test_the_dimension_of_a_gaussian_is_found(estimator, dim):
    assert estimator(gaussian(2000, dim, 64)).value == pytest.approx(dim, rel=0.1)


# --- repeats


@pytest.mark.parametrize("distance", [0.0, 1e-6])
@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_repeated_rows_change_nothing_once_they_are_dropped(distance, estimator):
    clean = gaussian(400, 5, 32)
    copies = clean[:20] + distance * gaussian(20, 32, seed=1) / math.sqrt(32)
    with_repeats = torch.cat([clean, copies])
    (estimate,), dropped = estimate_dimensions(PooledFeatures((with_repeats,), num_tokens=0), estimator)
    assert dropped == 20
    assert estimate == estimator(clean)


@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_rows_overwritten_by_repeats_cost_less_than_two_percent(estimator):
    clean = gaussian(1000, 5, 32)
    repeated = clean.clone()
    repeated[:50] = repeated[50:100]
    (estimate,), dropped = estimate_dimensions(PooledFeatures((repeated,), num_tokens=0), estimator)
    assert dropped == 50
    assert estimate.value == pytest.approx(estimator(clean).value, rel=0.02)


@pytest.mark.parametrize("method", ["linear", "mle"])
def test_rows_overwritten_by_near_repeats_cost_more_than_two_percent_unless_dropped(method):
    # The reference drops no repeats: this is what the two tests above guard against.
    clean = gaussian(1000, 5, 32)
    repeated = clean.clone()
    repeated[:50] = repeated[50:100] + 1e-6 * gaussian(50, 32, seed=1)
    reference, spoiled = (TwoNN(method=method).fit(points.numpy()).dimension_ for points in (clean, repeated))
    assert abs(spoiled / reference - 1) > 0.1


@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_repeats_that_reach_an_estimator_are_an_error_and_not_a_number(estimator):
    points = gaussian(100, 5)
    with pytest.raises(DimensionError, match="coincide"):
        estimator(torch.cat([points, points[:1]]))
    with pytest.raises(DimensionError, match="coincide"):
        estimator(torch.cat([points, points[:1], points[:1]]))


def test_a_repeat_at_one_boundary_is_dropped_at_all():
    first, second = gaussian(200, 3), gaussian(200, 4, seed=1)
    second[7] = second[3]
    estimates, dropped = estimate_dimensions(PooledFeatures((first, second), num_tokens=0), twonn)
    kept = torch.arange(200) != 7
    assert dropped == 1
    assert estimates == (twonn(first[kept]), twonn(second[kept]))


def test_a_boundary_where_most_points_coincide_has_no_dimension_and_drops_nothing_elsewhere():
    points = gaussian(200, 3)
    estimates, dropped = estimate_dimensions(PooledFeatures((torch.ones(200, 3), points), num_tokens=0), twonn)
    assert dropped == 0
    assert estimates[0].value is None
    assert estimates[0].degenerate == "only 1 of 200 points are distinct."
    assert estimates[1] == twonn(points)


def test_the_first_of_each_group_of_repeats_is_kept():
    a, b, c = gaussian(3, 8)
    points = torch.stack([a, b, a, c, b + 1e-7, a, b])
    assert repeats(points).tolist() == [False, False, True, False, True, True, True]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_repeats_do_not_depend_on_the_unit_of_the_points(scale):
    points = gaussian(100, 8)
    points[60:70] = points[:10] * (1 + 1e-7)
    assert repeats(points * scale).nonzero().flatten().tolist() == list(range(60, 70))


@pytest.mark.parametrize("value", [0.0, 0.1, 5000.0])
def test_points_that_all_coincide_are_all_repeats_of_the_first(value):
    assert repeats(torch.full((5, 3), value)).tolist() == [False, True, True, True, True]


def test_no_points_and_one_point_have_no_repeats():
    assert repeats(torch.empty(0, 3)).tolist() == []
    assert repeats(torch.ones(1, 3)).tolist() == [False]


# --- neighbours


def constant_coordinate(points):
    points[:, 0] = 5000.0
    return points


def rogue_coordinate(points):
    points[:, 0] *= 1e4 / points[:, 0].std()
    return points


def tight_cluster_far_away(points):
    points[:40] = points[:40] * 1e-6 + 100.0
    return points


def loose_cluster_far_away(points):
    points[:40] = points[:40] * 1e-3 + 100.0
    return points


def tight_cluster_at_the_origin(points):
    points[:40] *= 1e-6
    points[40:] += 1000.0
    return points


def two_clusters(points):
    points[::2] += 1000.0
    return points


def few_far_away(points):
    points[:5] += 1e5
    return points


KINDS = [
    lambda points: points,
    constant_coordinate,
    rogue_coordinate,
    tight_cluster_far_away,
    loose_cluster_far_away,
    tight_cluster_at_the_origin,
    two_clusters,
    few_far_away,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__.strip("<>"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "tile_bytes"), [(2, 64 * 2**20), (2, 50_000), (1, 1)])
def test_neighbour_distances_equal_brute_force(monkeypatch, kind, dtype, k, tile_bytes):
    monkeypatch.setattr(estimators, "_TILE_BYTES", tile_bytes)
    points = kind(gaussian(150, 10, 48)).to(dtype)
    distances = neighbour_distances(points, k)
    assert distances.dtype == torch.float64
    np.testing.assert_allclose(distances.numpy(), brute_force(points, k), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [3, 4, 10, 11, 12])
def test_neighbour_distances_of_few_points_equal_brute_force(n):
    points = gaussian(n, 5)
    np.testing.assert_allclose(neighbour_distances(points).numpy(), brute_force(points), rtol=1e-12)


def test_neighbour_distances_do_not_depend_on_the_precision_that_training_uses():
    points = two_clusters(gaussian(300, 10, 48)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = neighbour_distances(points)
    np.testing.assert_allclose(distances.numpy(), brute_force(points), rtol=1e-12)


@pytest.mark.parametrize(("spread", "offset"), [(1e4, 0), (0, 1e8)])
def test_a_coordinate_that_dwarfs_the_others_costs_no_second_search(monkeypatch, spread, offset):
    monkeypatch.setattr(torch, "cdist", None)
    points = gaussian(150, 10, 48)
    points[:, 0] = spread * points[:, 1] + offset
    np.testing.assert_allclose(neighbour_distances(points).numpy(), brute_force(points), rtol=1e-12)


def test_neighbour_distances_leave_the_points_as_they_were():
    points = gaussian(50, 5)
    before = points.clone()
    neighbour_distances(points)
    repeats(points)
    assert torch.equal(points, before)


def test_two_points_have_no_second_neighbour():
    with pytest.raises(ValueError, match="2 points have no 2 neighbours"):
        neighbour_distances(gaussian(2, 5))


# --- what cannot be estimated


@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_too_few_points_are_an_error(estimator):
    with pytest.raises(DimensionError, match="3 points were given; TwoNN expects at least 4"):
        estimator(gaussian(3, 5))
    assert estimator(gaussian(4, 5)).value > 0


@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_points_whose_neighbours_are_all_equally_far_are_an_error(estimator):
    lattice = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0), torch.arange(5.0))
    with pytest.raises(DimensionError, match="equally far"):
        estimator(lattice)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_points_that_are_not_finite_are_an_error(estimator, value):
    points = gaussian(60, 5)
    points[3, 2] = value
    with pytest.raises(DimensionError, match="not finite"):
        estimator(points)


# --- invariances


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-6, 1e6),
    shift=st.floats(-100, 100),
)
@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_the_dimension_survives_rotation_translation_scaling_and_permutation(estimator, seed, scale, shift):
    points = gaussian(80, 4, 12, seed)
    rng = np.random.default_rng(seed)
    rotation = torch.from_numpy(np.linalg.qr(rng.standard_normal((12, 12)))[0])
    order = torch.from_numpy(rng.permutation(80))
    moved = scale * (points[order] @ rotation + shift)
    assert estimator(moved).value == pytest.approx(estimator(points).value, rel=1e-8)


def test_log_ratios_are_ascending_and_not_negative():
    log_mu = log_ratios(gaussian(100, 5))
    assert (log_mu >= 0).all()
    assert (log_mu.diff() >= 0).all()
