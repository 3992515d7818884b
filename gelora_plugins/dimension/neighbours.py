"""Nearest neighbours, exact to float64 at about the cost of one float32 matrix product, and points that coincide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gelora_plugins.errors import DimensionError

REPEAT_TOLERANCE = 1e-5  # in units of the spread of the points, see `_spread`
_SPARE = 8  # neighbours listed beyond the k asked for, so that rounding seldom pushes one of the k off the list
_TILE_BYTES = 16 * 2**20  # of the product: large enough to be fast, small enough for a processor's last cache
_SMALL_TILE_BYTES = 2**20  # of what is only read once: fits the second cache


@dataclass(frozen=True)
class Neighbours:
    """The nearest others of each of n points, nearest first.

    Attributes:
        distances: (n, m) float64, ascending. The first k are exact, where k is what was asked of `find_neighbours`;
            the others carry the rounding of the product that found them, about 1 % of the distance at worst.
        indices: (n, m) int64, the row of each in the points.
    """

    distances: Tensor
    indices: Tensor


def find_neighbours(points: Tensor, k: int, listed: int = 0) -> Neighbours:
    """The `max(k + 8, listed)` nearest others of each of `points` (n, D), the distances to the first k exact.

    Candidates come from a float32 matrix product of the points minus their mean. Rounding moves no squared distance
    by more than a bound that is known (`_error_bound`), so the candidates that may be among the k nearest are known
    too, and their distances are computed again in float64 from differences of the points as given. A row is searched
    again with a float64 product, and at last by differences alone, when the bound leaves too many candidates for the
    list, or is half the distance: near points far from the mean, a coordinate that dwarfs the others.

    The result is on the device of the points (MPS has no float64, so there on the CPU). Memory beside the points: one
    centred copy (float32; float64 while a row needs it) and a few tiles of 16 MiB, or of one row where that is more.
    Neither autocast nor TF32 takes part, whatever the caller's settings are.

    Raises:
        ValueError: fewer than k + 1 points.
        DimensionError: a point is not finite.
    """
    n = len(points)
    if n <= k:
        raise ValueError(f"{n} points have no {k} neighbours each.")
    if points.device.type == "mps":
        points = points.cpu()
    with _full_precision(points.device):
        mean = points.mean(dim=0, dtype=torch.float64)
        if not mean.isfinite().all():
            raise DimensionError("Some points are not finite; expected finite points.")
        m = min(n - 1, max(k + _SPARE, listed))
        found = Neighbours(
            distances=torch.empty(n, m, dtype=torch.float64, device=points.device),
            indices=torch.empty(n, m, dtype=torch.int64, device=points.device),
        )
        rows = torch.arange(n, device=points.device)
        for dtype in (torch.float32, torch.float64):
            if len(rows):
                rows = _by_product(points, mean, rows, k, dtype, found)
        _by_differences(points, rows, found)
    return found


def neighbour_distances(points: Tensor, k: int = 2) -> Tensor:
    """Distances from each point to its k nearest others: (n, D) -> (n, k) float64, ascending, exact."""
    return find_neighbours(points, k).distances[:, :k]


def repeats(points: Tensor, search: Callable[[Tensor], Neighbours], least: int = 2) -> tuple[Tensor, Neighbours | None]:
    """Which of `points` (n, D) coincide with another that stays: (n,) bool; and `search` of the points that stay.

    Two points coincide when they are nearer than REPEAT_TOLERANCE times the spread of all. The first of each group
    stays. Equal rows are found without a search, and the search of the others is the one that finds the near repeats;
    only these cost a second search. None is made of fewer than `least` points.
    """
    n = len(points)
    index = torch.arange(n, device=points.device)
    group = torch.unique(points, dim=0, return_inverse=True)[1]
    repeated = torch.full_like(index, n).scatter_reduce(0, group, index, "amin")[group] != index
    tolerance = REPEAT_TOLERANCE * _spread(points)
    while True:
        stay = (~repeated).nonzero().flatten()
        if len(stay) < least:
            return repeated, None
        found = search(points[stay] if repeated.any() else points)
        order = torch.arange(len(stay), device=found.indices.device)
        late = ((found.distances <= tolerance) & (found.indices < order[:, None])).any(dim=1)
        if not late.any():
            return repeated, found
        repeated[stay[late]] = True


def _spread(points: Tensor) -> Tensor:
    """How far from their coordinates' medians all but the farthest twentieth of `points` (n, D) lie: a float64 scalar.

    One document a million times farther than the rest would set the root mean square distance alone, and all others
    would seem to coincide. A smaller share than 95 % would be the spread of the coinciding points where most coincide.
    """
    differences = points - points.median(dim=0).values
    distances: Tensor = torch.linalg.vector_norm(differences, dim=1, dtype=torch.float64)
    return distances.quantile(0.95)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Without gradients and autocast, and float32 products in float32 (not TF32, not bfloat16)."""
    # torch 2.9 has a setting for each backend; its old common one can then neither be read nor restored in every state.
    products = [getattr(getattr(torch.backends, name), "matmul", None) for name in ("cuda", "mkldnn")]
    backends: list[Any] = [product for product in products if hasattr(product, "fp32_precision")]
    before = [backend.fp32_precision for backend in backends] or [torch.get_float32_matmul_precision()]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if not backends:
            torch.set_float32_matmul_precision("highest")
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=False):
            backend.fp32_precision = precision
        if not backends:
            torch.set_float32_matmul_precision(before[0])


def _error_bound(dim: int, dtype: torch.dtype) -> float:
    """g such that n_y - 2xy + n_x, with n the squared norms, is within g (n_x + n_y) of |x - y|^2 when x and y are
    rounded to `dtype` and multiplied in it, in whatever order the product is summed.

    A sum of D products is off by at most D u / (1 - D u) times the sum of their magnitudes, u = eps / 2 (Higham,
    "Accuracy and stability of numerical algorithms", 2002, eq. 3.5), and 2 |x| |y| <= n_x + n_y. The 8 covers the
    rounding of x, y, n_y and of the two additions.
    """
    du = (dim + 8) * torch.finfo(dtype).eps / 2
    return du / (1 - du)


def _by_product(points: Tensor, mean: Tensor, rows: Tensor, k: int, dtype: torch.dtype, found: Neighbours) -> Tensor:
    """Fill in `rows` of `found` as far as a product in `dtype` can vouch for them; the rows that it cannot."""
    n, dim = points.shape
    x = torch.empty(n, dim, dtype=dtype, device=points.device)
    size = _tile_rows(dim, 8, _SMALL_TILE_BYTES)
    for part, centred in zip(torch.split(points, size), torch.split(x, size), strict=True):
        centred.copy_(part.double() - mean)
    scale = x.abs().max().clamp(min=torch.finfo(dtype).tiny)
    x /= scale  # no square leaves the range of float32
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()
    m = found.distances.shape[1]
    bound = _error_bound(dim, dtype)
    least = dim * torch.finfo(dtype).tiny  # what may be lost below the range
    low_norms = ((1 - bound) * norms).to(dtype)
    unsure = []
    for here in torch.split(rows, _tile_rows(n, x.element_size(), _TILE_BYTES)):
        # The least that each squared distance can be, without n_x: a constant of the row, which only adds rounding.
        low = torch.addmm(low_norms, x[here], x.T, alpha=-2)
        low[torch.arange(len(here), device=x.device), here] = torch.inf
        low, indices = low.topk(m, largest=False)
        low = low.double() + ((1 - bound) * norms[here, None] - least)
        width = 2 * (bound * (norms[here, None] + norms[indices]) + least)
        reach = (low + width).kthvalue(k, dim=1, keepdim=True).values  # the k-th distance is at most this
        near = low <= reach
        sure = (width <= reach / 2).all(dim=1)
        if m < n - 1:
            sure &= ~near[:, -1]
        unsure.append(here[~sure])
        here, near, indices = here[sure], near[sure], indices[sure]
        distances = (low + width / 2)[sure].clamp(min=0).sqrt() * scale
        row, column = near.nonzero(as_tuple=True)
        distances[row, column] = _exact(points, here[row], indices[row, column])
        found.distances[here], order = distances.sort(dim=1)
        found.indices[here] = indices.gather(1, order)
    return torch.cat(unsure)


def _exact(points: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Distances of pairs of points, float64, from their differences."""
    size = _tile_rows(points.shape[1], 8, _SMALL_TILE_BYTES)
    parts = [  # index_select is several times faster than an index in brackets here (torch 2.13, CPU)
        points.index_select(0, a).double().sub_(points.index_select(0, b)).square_().sum(dim=1)
        for a, b in zip(torch.split(first, size), torch.split(second, size), strict=True)
    ]
    return torch.cat(parts).sqrt_()


def _by_differences(points: Tensor, rows: Tensor, found: Neighbours) -> None:
    """Fill in `rows` of `found` from differences alone: many times slower than a product, and always right."""
    if not len(rows):
        return
    every = points.double()
    for here in torch.split(rows, _tile_rows(len(points), 8, _TILE_BYTES)):
        distances = torch.cdist(every[here], every, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(here), device=points.device), here] = torch.inf
        found.distances[here], found.indices[here] = distances.topk(found.distances.shape[1], largest=False)


def _tile_rows(columns: int, element_size: int, tile_bytes: int) -> int:
    return max(1, tile_bytes // (columns * element_size))
