import pytest
import torch
from skdim.id import TwoNN

from gelora_plugins.dimension.estimators import NeighbourEstimator, gride, mle, twonn, twonn_mle
from gelora_plugins.dimension.measure import estimate_dimensions, standardised
from gelora_plugins.dimension.profile import DimensionEstimate
from gelora_plugins.errors import DimensionError
from tests.support.points import gaussian

ESTIMATORS = {"twonn": twonn, "twonn_mle": twonn_mle, "gride": gride, "mle": mle}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


def plain(points):
    """An estimator as a stranger would write it."""
    return DimensionEstimate(value=float(points.shape[0]), num_points=len(points))


# --- one search of neighbours for a boundary


@pytest.fixture
def searches(monkeypatch):
    """The number of points of each search."""
    made = []
    search = NeighbourEstimator.search
    monkeypatch.setattr(
        NeighbourEstimator, "search", lambda self, points: made.append(len(points)) or search(self, points)
    )
    return made


class Reading(list):
    """Boundaries that remember which of them were read."""

    def __init__(self, points):
        super().__init__(points)
        self.read = []

    def __iter__(self):
        for boundary in range(len(self)):
            self.read.append(boundary)
            yield self[boundary]


def test_without_repeats_each_boundary_is_read_and_searched_once(searches):
    points = Reading([gaussian(200, 3), gaussian(200, 4, seed=1)])
    estimates, dropped = estimate_dimensions(points, twonn)
    assert searches == [200, 200]
    assert points.read == [0, 1]
    assert dropped == 0
    assert estimates == (twonn(points[0]), twonn(points[1]))


def test_with_a_repeat_each_boundary_is_read_and_searched_twice(searches):
    points = Reading([gaussian(200, 3), gaussian(200, 4, seed=1), gaussian(200, 5, seed=2)])
    points[1][7] = points[1][3]
    estimate_dimensions(points, twonn)
    assert searches == [200, 199, 200, 199, 199, 199]
    assert points.read == [0, 1, 2, 0, 1, 2]


def test_a_repeat_at_one_boundary_is_dropped_at_all():
    first, second = gaussian(200, 3), gaussian(200, 4, seed=1)
    second[7] = second[3]
    estimates, dropped = estimate_dimensions((first, second), twonn)
    kept = torch.arange(200) != 7
    assert dropped == 1
    assert estimates == (twonn(first[kept]), twonn(second[kept]))


def test_a_boundary_where_most_points_coincide_has_no_dimension_and_drops_nothing_elsewhere(searches):
    points = gaussian(200, 3)
    estimates, dropped = estimate_dimensions((torch.ones(200, 3), points), twonn)
    assert searches == [200]
    assert dropped == 0
    assert estimates[0].value is None
    assert estimates[0].degenerate == "only 1 of 200 points are distinct."
    assert estimates[1] == twonn(points)


@pytest.mark.parametrize(("distinct", "has_one"), [(99, False), (100, True), (150, True)])
def test_a_boundary_has_a_dimension_from_half_of_its_points_on(distinct, has_one):
    points = gaussian(200, 3)
    points[distinct:] = points[0]
    (found,), dropped = estimate_dimensions((points,), plain)
    assert (found.value is not None) == has_one
    assert (found.num_points, dropped) == (distinct, 200 - distinct if has_one else 0)


def test_too_few_documents_with_points_of_their_own_are_an_error():
    first, second = gaussian(100, 3), gaussian(100, 4)
    first[:30] = first[30:60]
    second[60:] = second[:40]
    with pytest.raises(DimensionError, match="30 of 100 documents have a point of their own at every block boundary"):
        estimate_dimensions((first, second), twonn)


def test_errors_say_which_boundary():
    with pytest.raises(DimensionError, match=r"Boundary 1: The nearest neighbours of most points are equally far"):
        estimate_dimensions((gaussian(60, 3), torch.eye(60)), twonn)


def test_the_same_documents_are_in_each_half_at_every_boundary():
    points = gaussian(300, 4, 16)
    turned = points.flip(1) * 3 + 1
    (first, second), _ = estimate_dimensions((points, turned), twonn_mle, seed=5)
    assert first.replicates == pytest.approx(second.replicates, rel=1e-4)
    (other, _), _ = estimate_dimensions((points, turned), twonn_mle, seed=6)
    assert other.value == first.value
    assert other.replicates != pytest.approx(first.replicates, rel=1e-4)


def test_a_plain_function_of_the_points_is_an_estimator():
    first, second = gaussian(200, 3), gaussian(200, 4, seed=1)
    assert [e.value for e in estimate_dimensions((first, second), plain)[0]] == [200, 200]
    second[7] = second[3]
    estimates, dropped = estimate_dimensions((first, second), plain)
    assert [e.value for e in estimates] == [199, 199]
    assert dropped == 1


def test_an_estimator_that_returns_a_number_is_an_error():
    with pytest.raises(DimensionError, match="returned a float; expected a DimensionEstimate"):
        estimate_dimensions((gaussian(60, 3),), lambda points: 3.0)


def test_the_device_can_be_chosen():
    points = gaussian(100, 3)
    assert estimate_dimensions((points,), twonn, device="cpu") == estimate_dimensions((points,), twonn)


# --- standardising


def test_standardised_coordinates_have_mean_0_and_deviation_1_and_constant_ones_are_left_out():
    points = gaussian(500, 3) * torch.tensor([1e-3, 1.0, 1e3]) + torch.tensor([7.0, 0.0, -5.0])
    points = torch.cat([points, torch.full((500, 1), 5000.1), torch.zeros(500, 1)], dim=1).float()
    found = standardised(points)
    assert found.dtype == torch.float32
    assert found[:, :3].mean(dim=0).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert found[:, :3].std(dim=0, correction=0).tolist() == pytest.approx([1, 1, 1], rel=1e-6)
    assert (found[:, 3:] == 0).all()


def test_a_rogue_coordinate_counts_as_any_other_once_standardised():
    clean = gaussian(1000, 12, 64)
    rogue = clean.clone()
    rogue[:, 0] *= 1000
    (expected,), _ = estimate_dimensions((clean,), twonn_mle, standardise=True)
    (found,), _ = estimate_dimensions((rogue,), twonn_mle, standardise=True)
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert found.warning == ""


# --- what goes wrong on real hidden states: within 5 % of the clean value, or flagged


def random_directions(n, dim, seed=1):
    return torch.nn.functional.normalize(gaussian(n, dim, seed=seed), dim=1)


def a_tenth_repeats(points):
    points[900:] = points[:100]
    return points


def two_percent_near_repeats(points):
    points[980:] = points[:20] + 1e-6 * random_directions(20, points.shape[1])
    return points


def constant_coordinate(points):
    points[:, 0] = 5000.0
    return points


def rogue_coordinate(points):
    points[:, 0] *= 100.0
    return points


def one_point_far_away(points):
    points[0] = 1e4
    return points


def one_point_ten_million_times_farther(points):
    points[0] *= 1e7
    return points


def two_clusters(points):
    points[::2] += 1000.0
    return points


def cluster_far_away(points):
    points[::2] = points[::2] * 0.1 + 100.0
    return points


def rounded_to_bfloat16(points):
    return points.bfloat16()


CASES = [
    (a_tenth_repeats, slice(0, 900)),
    (two_percent_near_repeats, slice(0, 980)),
    (constant_coordinate, slice(None)),
    (rogue_coordinate, slice(None)),
    (one_point_far_away, slice(1, None)),
    (one_point_ten_million_times_farther, slice(1, None)),
    (two_clusters, slice(None)),
    (cluster_far_away, slice(None)),
    (rounded_to_bfloat16, slice(None)),
]


@pytest.mark.parametrize(("spoil", "clean"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
@pytest.mark.parametrize("dim", [5, 12])
@every_estimator
def test_a_spoilt_set_has_the_clean_dimension_or_a_warning(estimator, dim, spoil, clean):
    points = gaussian(1000, dim, 64).float()
    expected = estimator(points[clean]).value
    (found,), _ = estimate_dimensions((spoil(points.clone()),), estimator)
    assert found.warning or found.value == pytest.approx(expected, rel=0.05)
    assert bool(found.warning) == (spoil is rogue_coordinate)


def test_a_rogue_coordinate_is_named():
    points = rogue_coordinate(gaussian(1000, 12, 64))
    (found,), _ = estimate_dimensions((points,), twonn)
    assert found.warning.startswith("feature 0 alone holds more than half of the variance")
    assert "standardise: true" in found.warning


@pytest.mark.parametrize(("share", "warned"), [(0.49, False), (0.51, True)])
def test_a_coordinate_is_rogue_from_half_of_the_variance_on(share, warned):
    points = standardised(gaussian(200, 5))
    points[:, 3] *= (4 * share / (1 - share)) ** 0.5  # the other four have a variance of 1 each
    (found,), _ = estimate_dimensions((points,), plain)
    assert found.warning.startswith("feature 3 alone") == bool(found.warning) == warned


@pytest.mark.parametrize("estimator", [twonn, twonn_mle, gride, mle], ids=ESTIMATORS)
@pytest.mark.parametrize("distance", [0.0, 1e-6])
def test_dropped_repeats_leave_no_trace_in_the_estimate(estimator, distance):
    clean = gaussian(400, 5, 32)
    copies = clean[:20] + distance * random_directions(20, 32)
    (found,), dropped = estimate_dimensions((torch.cat([clean, copies]),), estimator)
    assert dropped == 20
    assert found == estimator(clean)


@pytest.mark.parametrize("method", ["linear", "mle"])
def test_near_repeats_spoil_an_estimate_that_keeps_them(method):
    # The reference drops no repeats: this is what the tests above guard against.
    clean = gaussian(1000, 5, 64)
    spoilt = two_percent_near_repeats(clean.clone())
    reference, found = (TwoNN(method=method).fit(points.numpy()).dimension_ for points in (clean, spoilt))
    assert abs(found / reference - 1) > 0.05
