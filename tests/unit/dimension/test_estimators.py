import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from skdim.id import MLE, TwoNN

from gelora_plugins.dimension.estimators import (
    NeighbourEstimator,
    gride,
    gride_at,
    mle,
    twonn,
    twonn_mle,
)
from gelora_plugins.dimension.halves import VARIANCE_FACTOR, half_distances, halves, list_length
from gelora_plugins.errors import DimensionError
from gelora_plugins.plugins import find
from tests.reference.clean_sets import checksum, clean_sets
from tests.support.points import brute_force, gaussian

REFERENCE = Path(__file__).parents[2] / "reference"
CLEAN = dict(clean_sets())
DADAPY = json.loads((REFERENCE / "dadapy.json").read_text())["sets"]
ESTIMATORS = {"twonn": twonn, "twonn_mle": twonn_mle, "gride": gride, "mle": mle}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


@every_estimator
def test_the_estimators_are_registered(estimator):
    name = next(name for name, registered in ESTIMATORS.items() if registered is estimator)
    assert find("estimator", name) is estimator


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


@pytest.mark.parametrize("name", CLEAN)
def test_mle_equals_scikit_dimension(name):
    expected = MLE().fit(CLEAN[name], n_neighbors=10, comb="mle").dimension_
    assert mle(torch.from_numpy(CLEAN[name])).value == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("name", CLEAN)
def test_gride_equals_dadapy(name):
    # Not at scale 1, where DADApy leaves out the largest ratios; these sets have none so large at higher scales.
    found = [gride_at(scale)(torch.from_numpy(CLEAN[name])).value for scale in (2, 4, 8)]
    assert found == pytest.approx(DADAPY[name]["gride"][1:], rel=1e-9)


@pytest.mark.parametrize("n", [50, 51, 59, 60, 99, 101])
def test_the_number_of_kept_ratios_is_scikit_dimensions_for_every_size(n):
    points = gaussian(n, 4)
    assert twonn(points).value == pytest.approx(TwoNN().fit(points.numpy()).dimension_, rel=1e-11)
    assert twonn_mle(points).value == pytest.approx(TwoNN(method="mle").fit(points.numpy()).dimension_, rel=1e-11)


# --- against their definitions


def test_twonn_mle_is_the_unbiased_censored_estimate():
    r = brute_force(gaussian(200, 6))
    log_mu = np.sort(np.log(r[:, 1] / r[:, 0]))
    assert twonn_mle(gaussian(200, 6)).value == pytest.approx(179 / (log_mu[:180].sum() + 20 * log_mu[179]), rel=1e-9)


def test_gride_at_scale_1_is_the_maximum_likelihood_of_all_ratios():
    r = brute_force(gaussian(200, 6))
    assert gride_at(1)(gaussian(200, 6)).value == pytest.approx(199 / np.log(r[:, 1] / r[:, 0]).sum(), rel=1e-12)


@pytest.mark.parametrize("scale", [2, 5])
def test_gride_maximises_its_likelihood(scale):
    points = gaussian(200, 6)
    r = brute_force(points, 2 * scale)
    u = np.log(r[:, 2 * scale - 1] / r[:, scale - 1])

    def surprise(d):  # 199 of 200 points count, as in the estimator
        return -199 * np.log(d) - ((scale - 1) * np.log(np.expm1(d * u)) - (2 * scale - 1) * d * u).sum()

    best = minimize_scalar(surprise, bounds=(1, 20), method="bounded", options={"xatol": 1e-9}).x
    assert gride_at(scale)(points).value == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("n", [200, 2000])
def test_the_estimates_of_a_constant_density_are_unbiased(n):
    # Distances of independent points: d log r_j are the logs of sums of j exponentials.
    rng = np.random.default_rng(0)
    for estimator in ESTIMATORS.values():
        gamma = rng.exponential(size=(2_000_000 // n // 10, n, 10)).cumsum(axis=2)
        values = estimator.from_distances(torch.from_numpy(gamma[..., : estimator.num_neighbours] ** (1 / 7)))
        assert values.mean() == pytest.approx(7, rel=5 * float(values.std()) / 7 / math.sqrt(len(values)) + 1 / n)


@every_estimator
@pytest.mark.parametrize("dim", [1, 3, 6])
def test_the_dimension_of_a_gaussian_is_found(estimator, dim):
    assert estimator(gaussian(2000, dim, 64)).value == pytest.approx(dim, rel=0.1)


def test_noise_raises_the_dimension_at_small_scales_only():
    points = gaussian(1000, 2, 30) + 0.02 * gaussian(1000, 30, seed=1)
    assert gride_at(1)(points).value > 4
    assert gride_at(64)(points).value == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("k", range(1, 130))
def test_nearly_every_half_holds_k_of_the_listed_neighbours(k):
    assert binom.cdf(k - 1, list_length(k), 0.5) < 5e-4


# --- random halves


def test_the_halves_are_the_same_for_the_same_number_and_seed():
    rows = halves(101, 3)
    assert rows.shape == (100, 50)
    assert torch.equal(rows, halves(101, 3))
    assert not torch.equal(rows, halves(101, 4))
    assert all(len(set(half)) == 50 for half in rows.tolist())


def test_the_halves_leave_the_random_state_alone():
    before = torch.get_rng_state()
    halves(100, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("k", [2, 4, 10])
def test_distances_inside_a_half_are_those_of_the_half_alone(monkeypatch, k):
    monkeypatch.setattr("gelora_plugins.dimension.halves._CHUNK", 1000)  # a few halves at a time
    points = gaussian(300, 5)
    rows = halves(300, 0)
    inside = torch.cat(list(half_distances(mle.search(points), rows, k)))
    assert inside.shape == (100, 150, k)
    alone = np.stack([brute_force(points[half], k) for half in rows])
    differ = np.abs(inside.numpy() / alone - 1) > 1e-4
    assert differ.any(axis=2).mean() < 1e-3  # where the list holds fewer than k of the half


def test_a_list_that_is_too_short_gives_a_lower_bound():
    points = gaussian(300, 5)
    rows = halves(300, 0)
    found = NeighbourEstimator(1, lambda r: r).search(points)
    short = type(found)(found.distances[:, :4], found.indices[:, :4])
    inside = torch.cat(list(half_distances(short, rows, 3)))
    alone = torch.from_numpy(np.stack([brute_force(points[half], 3) for half in rows]))
    assert (inside < 0.999 * alone).any()
    assert (inside <= 1.001 * alone).all()


@every_estimator
def test_the_standard_error_and_the_interval_follow_from_the_halves(estimator):
    points = gaussian(400, 6)
    estimate = estimator(points)
    of_halves = [estimator(points[half]).value for half in halves(400, 0)]
    assert estimate.std_error == pytest.approx(math.sqrt(VARIANCE_FACTOR) * statistics.stdev(of_halves), rel=1e-3)
    mean = statistics.fmean(of_halves)
    expected = [estimate.value + math.sqrt(VARIANCE_FACTOR) * (value - mean) for value in of_halves]
    assert estimate.replicates == pytest.approx(expected, rel=1e-2)  # few points have no list long enough
    assert statistics.stdev(estimate.replicates) == pytest.approx(estimate.std_error, rel=1e-4)
    assert statistics.fmean(estimate.replicates) == pytest.approx(estimate.value, rel=1e-5)
    factor = math.exp(1.96 * estimate.std_error / estimate.value)
    assert estimate.interval == pytest.approx((estimate.value / factor, estimate.value * factor))


def test_the_variance_among_halves_is_that_of_independent_spacings():
    # On all points E_1, with a variance of 1; on a half, in the mean over halves, the sum of 2^-j E_j.
    of_the_mean = sum(4.0**-j for j in range(1, 50))
    assert pytest.approx(1 / (2 - of_the_mean)) == VARIANCE_FACTOR


@every_estimator
def test_the_standard_error_is_the_spread_over_other_points(estimator):
    # 60 sets know the spread to 9 % (one standard error); benchmarks/statistics/estimators.py measures this on more.
    found = [estimator(gaussian(500, 5, seed=seed)) for seed in range(60)]
    stated = statistics.fmean(estimate.std_error for estimate in found)
    assert stated == pytest.approx(statistics.stdev(estimate.value for estimate in found), rel=0.3)


@every_estimator
def test_few_points_have_no_standard_error(estimator):
    assert estimator(gaussian(49, 3)).std_error is None
    assert estimator(gaussian(49, 3)).replicates == ()
    assert len(estimator(gaussian(50, 3)).replicates) == 100


@every_estimator
def test_the_estimate_does_not_depend_on_the_callers_default_device(estimator):
    points = gaussian(100, 4)
    with torch.device("meta"):
        estimate = estimator(points)
    assert estimate == estimator(points)


# --- what cannot be estimated


@every_estimator
def test_repeats_that_reach_an_estimator_are_an_error_and_not_a_number(estimator):
    points = gaussian(100, 5)
    with pytest.raises(DimensionError, match="coincide"):
        estimator(torch.cat([points, points[:1]]))
    with pytest.raises(DimensionError, match="coincide"):
        estimator(torch.cat([points, points[:1], points[:1]]))


@pytest.mark.parametrize(("estimator", "least"), [(twonn, 4), (twonn_mle, 4), (gride, 5), (mle, 11)])
def test_too_few_points_are_an_error(estimator, least):
    with pytest.raises(DimensionError, match=f"{least - 1} points were given; expected at least {least}"):
        estimator(gaussian(least - 1, 5))
    assert estimator(gaussian(least, 5)).value > 0


@pytest.mark.parametrize("estimator", [twonn, twonn_mle])
def test_points_whose_neighbours_are_all_equally_far_are_an_error(estimator):
    lattice = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0), torch.arange(5.0))
    with pytest.raises(DimensionError, match="equally far"):
        estimator(lattice)


@every_estimator
def test_corners_of_a_simplex_are_an_error(estimator):
    with pytest.raises(DimensionError, match="equally far"):
        estimator(torch.eye(60))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_estimator
def test_points_that_are_not_finite_are_an_error(estimator, value):
    points = gaussian(60, 5)
    points[3, 2] = value
    with pytest.raises(DimensionError, match="not finite"):
        estimator(points)


# --- invariances


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-6, 1e6),
    shift=st.floats(-100, 100),
)
@every_estimator
def test_the_dimension_survives_rotation_translation_scaling_and_permutation(estimator, seed, scale, shift):
    points = gaussian(80, 4, 12, seed)
    rng = np.random.default_rng(seed)
    rotation = torch.from_numpy(np.linalg.qr(rng.standard_normal((12, 12)))[0])
    order = torch.from_numpy(rng.permutation(80))
    moved = scale * (points[order] @ rotation + shift)
    assert estimator(moved).value == pytest.approx(estimator(points).value, rel=1e-8)
