import numpy as np
import pytest
import torch

from gelora_plugins.dimension import neighbours
from gelora_plugins.dimension.neighbours import find_neighbours, neighbour_distances, repeats
from gelora_plugins.errors import DimensionError
from tests.support.points import brute_force, gaussian, nearest

# --- exact on every kind of points


def plain(points):
    return points


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


def many_copies_of_one_point(points):
    points[:60] = points[60]
    return points


def tiny(points):
    return points * 1e-25


def huge(points):
    return points * 1e25


KINDS = [
    plain,
    constant_coordinate,
    rogue_coordinate,
    tight_cluster_far_away,
    loose_cluster_far_away,
    tight_cluster_at_the_origin,
    two_clusters,
    few_far_away,
    many_copies_of_one_point,
    tiny,
    huge,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "tile_bytes"), [(2, 16 * 2**20), (2, 50_000), (1, 1), (10, 50_000)])
def test_the_distances_equal_brute_force(monkeypatch, kind, dtype, k, tile_bytes):
    monkeypatch.setattr(neighbours, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(neighbours, "_SMALL_TILE_BYTES", tile_bytes)
    points = kind(gaussian(150, 10, 48)).to(dtype)
    distances = neighbour_distances(points, k)
    assert distances.dtype == torch.float64
    np.testing.assert_allclose(distances.numpy(), brute_force(points, k), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_longer_list_is_ascending_and_good_to_one_percent(kind):
    points = kind(gaussian(150, 10, 48)).float()
    found = find_neighbours(points, 2, listed=24)
    assert found.distances.shape == found.indices.shape == (150, 24)
    assert (found.distances.diff(dim=1) >= 0).all()
    np.testing.assert_allclose(found.distances.numpy(), brute_force(points, 24), rtol=0.01, atol=0)
    between = torch.linalg.vector_norm(points.double()[:, None] - points.double()[found.indices], dim=2)
    np.testing.assert_allclose(found.distances.numpy(), between.numpy(), rtol=0.01, atol=0)
    assert not (found.indices == torch.arange(150)[:, None]).any()
    assert all(len(set(row)) == 24 for row in found.indices.tolist())


@pytest.mark.parametrize("n", [3, 4, 10, 11, 12])
def test_the_distances_of_few_points_equal_brute_force(n):
    points = gaussian(n, 5)
    np.testing.assert_allclose(neighbour_distances(points).numpy(), brute_force(points), rtol=1e-12)


def test_many_points_in_many_dimensions_equal_brute_force():
    points = (gaussian(1000, 10, 512) + 0.1 * gaussian(1000, 512, seed=1)).float()
    np.testing.assert_allclose(neighbour_distances(points).numpy(), brute_force(points), rtol=1e-12)


# --- float32 where it can vouch, float64 where it cannot


@pytest.fixture
def searches(monkeypatch):
    """(dtype or "differences", rows searched) of each pass."""
    made = []
    by_product, by_differences = neighbours._by_product, neighbours._by_differences

    def product(points, mean, rows, k, dtype, found):
        made.append((dtype, len(rows)))
        return by_product(points, mean, rows, k, dtype, found)

    def differences(points, rows, found):
        if len(rows):
            made.append(("differences", len(rows)))
        by_differences(points, rows, found)

    monkeypatch.setattr(neighbours, "_by_product", product)
    monkeypatch.setattr(neighbours, "_by_differences", differences)
    return made


@pytest.mark.parametrize("kind", [plain, constant_coordinate, tiny, huge], ids=lambda kind: kind.__name__)
def test_float32_is_enough_for_common_points(searches, kind):
    neighbour_distances(kind(gaussian(150, 10, 48)).float())
    assert searches == [(torch.float32, 150)]


@pytest.mark.parametrize(("spread", "offset"), [(1e4, 0), (0, 1e8)])
def test_a_coordinate_that_dwarfs_the_others_costs_no_search_by_differences(searches, spread, offset):
    points = gaussian(150, 10, 48)
    points[:, 0] = spread * points[:, 1] + offset
    np.testing.assert_allclose(neighbour_distances(points).numpy(), brute_force(points), rtol=1e-12)
    assert "differences" not in dict(searches)


def test_only_the_rows_of_a_tight_cluster_far_away_are_searched_by_differences(searches):
    neighbour_distances(tight_cluster_far_away(gaussian(150, 10, 48)))
    assert searches[0] == (torch.float32, 150)
    assert searches[-1] == ("differences", 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [3, 100, 3000])
def test_the_error_of_a_product_is_within_its_bound(dtype, dim):
    # Of one sign, so that the roundings of the sum do not cancel.
    exact = torch.rand(50, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    x = exact.to(dtype)
    norms = exact.square().sum(dim=1)
    product = torch.addmm(norms.to(dtype), x, x.T, alpha=-2).double() + norms[:, None]
    true = torch.from_numpy(((exact[:, None] - exact[None]) ** 2).sum(dim=2).numpy())
    error = (product - true).abs() / (norms + norms[:, None])
    assert error.max() > 0
    assert error.max() < neighbours._error_bound(dim, dtype)


# --- the caller's settings


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_distances_do_not_depend_on_the_callers_settings(setting):
    points = two_clusters(gaussian(300, 10, 48)).float()
    with SETTINGS[setting]():
        distances = neighbour_distances(points)
    np.testing.assert_allclose(distances.numpy(), brute_force(points), rtol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_repeats_do_not_depend_on_the_callers_settings(setting):
    points = gaussian(50, 8).float()
    points[40:45], points[45:] = points[:5], points[5:10] * (1 + 1e-7)
    with SETTINGS[setting]():
        repeated, found = repeats(points, nearest)
    assert repeated.nonzero().flatten().tolist() == list(range(40, 50))
    assert torch.equal(found.distances, nearest(points[:40]).distances)


def test_the_distances_do_not_depend_on_the_default_dtype():
    points = gaussian(100, 10).float()
    torch.set_default_dtype(torch.bfloat16)
    try:
        distances = neighbour_distances(points)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(distances.numpy(), brute_force(points), rtol=1e-12)


def precision():
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return torch.get_float32_matmul_precision(), [getattr(product, "fp32_precision", None) for product in products]


def test_a_lower_precision_of_products_is_off_during_the_search_and_restored(monkeypatch):
    seen = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: seen.append(precision()[1]) or addmm(*args, **kwargs))
    torch.set_float32_matmul_precision("medium")
    try:
        before = precision()
        neighbour_distances(gaussian(100, 10).float())
        assert precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert before[0] == "medium"
    assert seen == [["ieee", "ieee"]]


def test_before_torch_2_9_the_one_setting_for_all_backends_is_used(monkeypatch):
    for name in ("cuda", "mkldnn"):
        monkeypatch.setattr(getattr(torch.backends, name), "matmul", object())
    setting = ["medium"]
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting[-1])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", setting.append)
    neighbour_distances(gaussian(100, 10).float())
    assert setting == ["medium", "highest", "medium"]


def test_the_precision_of_products_is_restored_after_an_error(monkeypatch):
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(DimensionError):
            neighbour_distances(torch.full((10, 3), torch.nan))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_points_are_left_as_they_were():
    points = gaussian(50, 5)
    before = points.clone()
    neighbour_distances(points)
    repeats(points, nearest)
    assert torch.equal(points, before)


def test_points_that_need_a_gradient_are_searched_without_one():
    assert not neighbour_distances(gaussian(50, 5).requires_grad_()).requires_grad


# --- what cannot be searched


def test_two_points_have_no_second_neighbour():
    with pytest.raises(ValueError, match="2 points have no 2 neighbours"):
        neighbour_distances(gaussian(2, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_points_that_are_not_finite_are_an_error(value):
    points = gaussian(60, 5)
    points[3, 2] = value
    with pytest.raises(DimensionError, match=r"^Some points are not finite; expected finite points\.$"):
        neighbour_distances(points)


def test_the_bound_of_a_product_is_highams_with_eight_roundings_more():
    assert neighbours._error_bound(92, torch.float32) == 100 * 2**-24 / (1 - 100 * 2**-24)
    assert neighbours._error_bound(92, torch.float64) == 100 * 2**-53 / (1 - 100 * 2**-53)
