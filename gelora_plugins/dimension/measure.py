"""Points at every block boundary -> one DimensionEstimate each, on the same documents and the same random halves."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gelora_plugins.dimension.estimators import NeighbourEstimator
from gelora_plugins.dimension.halves import halves
from gelora_plugins.dimension.neighbours import Neighbours, find_neighbours, repeats
from gelora_plugins.dimension.profile import MIN_POINTS, DimensionEstimate
from gelora_plugins.errors import DimensionError

ROGUE_SHARE = 0.5  # of the variance in one coordinate; from there on distances are mostly its own


def estimate_dimensions(
    points: Sequence[Tensor],
    estimator: Any,
    *,
    standardise: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> tuple[tuple[DimensionEstimate, ...], int]:
    """One estimate per boundary, all on the same documents, and how many documents were left out.

    A document whose point coincides with another's at any boundary is left out at all of them. A boundary where
    more than half of the points coincide, or fewer than 50 are distinct, has no dimension and no say in that.

    Args:
        points: (documents, features) at each boundary. Each is read once, or twice when documents are left out.
        estimator: a NeighbourEstimator, which shares one search of neighbours, or any function of distinct points.
        standardise: see `standardised`.
        seed: chooses the random halves.
        device: where to compute; None for where the points are.

    Raises:
        DimensionError: fewer than 50 documents are left, or the estimator finds no dimension.
    """
    search = estimator.search if isinstance(estimator, NeighbourEstimator) else partial(find_neighbours, k=1)
    estimates: dict[int, DimensionEstimate] = {}
    dropped, rows = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    for boundary, raw in enumerate(points):
        x = _prepared(raw, standardise, device)
        repeated, found = repeats(x, search, MIN_POINTS)
        if boundary == 0:
            dropped, rows = torch.zeros(len(x), dtype=torch.bool), halves(len(x), seed)
        distinct = int((~repeated).sum())
        if found is None or 2 * distinct < len(x):
            reason = f"only {distinct} of {len(x)} points are distinct."
            estimates[boundary] = DimensionEstimate(value=None, num_points=distinct, degenerate=reason)
            continue
        dropped |= repeated.cpu()
        if not dropped.any():  # the usual case: nothing is dropped anywhere, and one search has done for all
            estimates[boundary] = _estimate(estimator, x, rows, boundary, found)
    kept = ~dropped
    if int(kept.sum()) < MIN_POINTS:
        raise DimensionError(
            f"{int(kept.sum())} of {len(kept)} documents have a point of their own at every block boundary; expected "
            f"at least {MIN_POINTS}. Measure on more, or more varied, data, or choose another pooling."
        )
    if dropped.any():  # which gives others new neighbours, at every boundary: all is searched again without it
        rows = halves(int(kept.sum()), seed)
        for boundary, raw in enumerate(points):
            if boundary not in estimates or estimates[boundary].value is not None:
                x = _prepared(raw[kept], standardise, device)
                estimates[boundary] = _estimate(estimator, x, rows, boundary)
    return tuple(estimates[boundary] for boundary in sorted(estimates)), int(dropped.sum())


def standardised(points: Tensor) -> Tensor:
    """`points` (n, D), each coordinate minus its mean and divided by its standard deviation; constant ones become 0.

    Constant is what varies by no more than the rounding of its mean in the dtype of the points.
    """
    x = points.double()
    mean, sd = x.mean(dim=0), x.std(dim=0, correction=0)
    constant = sd <= torch.finfo(points.dtype).eps * mean.abs()
    return torch.where(constant, 0.0, (x - mean) / sd).to(points.dtype)


def _prepared(points: Tensor, standardise: bool, device: torch.device | str | None) -> Tensor:
    points = points if device is None else points.to(device)
    points = points.cpu() if points.device.type == "mps" else points  # which has no float64
    return standardised(points) if standardise else points


def _estimate(
    estimator: Any, points: Tensor, rows: Tensor, boundary: int, found: Neighbours | None = None
) -> DimensionEstimate:
    try:
        if isinstance(estimator, NeighbourEstimator):
            estimate: Any = estimator.estimate(found or estimator.search(points), rows)
        else:
            estimate = estimator(points)
    except DimensionError as error:
        raise DimensionError(f"Boundary {boundary}: {error}") from error
    if not isinstance(estimate, DimensionEstimate):
        raise DimensionError(f"The estimator returned a {type(estimate).__name__}; expected a DimensionEstimate.")
    return estimate if estimate.warning else replace(estimate, warning=_rogue(points))


def _rogue(points: Tensor) -> str:
    """What to say of a coordinate that holds more than half of the variance of `points`; nothing without one."""
    variances = points.double().var(dim=0)
    largest = int(variances.argmax())
    if len(variances) < 3 or variances[largest] <= ROGUE_SHARE * variances.sum():
        return ""
    return (
        f"feature {largest} alone holds more than half of the variance, so the dimension is mostly of that feature; "
        "compare with standardise: true."
    )
