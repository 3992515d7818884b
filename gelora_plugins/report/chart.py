"""Where each mark of the picture in report.html stands: dimensions above, ranks below, in one SVG. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gelora_plugins.ranks.plan import RankPlan

# In units of the SVG's viewBox; the margins hold the larger letters of a narrow screen.
WIDTH, HEIGHT = 640, 450
LEFT, RIGHT = 56, 632
DIMENSIONS, RANKS = (40, 250), (312, 412)  # top and bottom of the two panels
MOST_TICKS = 6


@dataclass(frozen=True)
class Tick:
    """A number on an axis, and where it stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A dimension or a rank: its middle and its height on the page, how wide a pointer finds it, and what it says.

    `sure` is 1 for a rank that no redraw changes and 0 for one that all of them do.
    """

    x: float
    y: float
    reach: float
    text: str
    sure: float = 1.0


@dataclass(frozen=True)
class Chart:
    """The marks of a picture. `lines` and `bands` are points of SVG's polylines and polygons, one for each stack."""

    lines: tuple[str, ...]
    bands: tuple[str, ...]
    dimensions: tuple[Mark, ...]
    ranks: tuple[Mark, ...]
    block_ticks: tuple[Tick, ...]
    dimension_ticks: tuple[Tick, ...]
    rank_ticks: tuple[Tick, ...]
    base_rank: float


@dataclass(frozen=True)
class _Axis:
    """A linear map of `low` to `high` onto `start` to `end`, with a tick at each `step`."""

    low: float
    high: float
    start: float
    end: float
    step: float = 1.0

    def __call__(self, value: float) -> float:
        # Halved, for the difference of two floats may be no float.
        share = (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> tuple[Tick, ...]:
        values = [self.low + i * self.step for i in range(round(self.high / self.step - self.low / self.step) + 1)]
        return tuple(Tick(self(value), f"{value:g}") for value in values)


def caption(plan: RankPlan) -> str:
    """What a picture of the plan was made with, in one line."""
    profile = plan.profile
    name = profile.model_name or profile.layout.model_type
    return (
        f"{name}: {profile.num_documents:,} documents, {profile.pooling} pooling, {profile.estimator}; ranks by "
        f"{plan.policy}"
    )


def chart(plan: RankPlan) -> Chart:
    """The picture of a plan. A boundary lies half a block before the block that it leads into; stacks have a gap."""
    profile = plan.profile
    across = _Axis(-1.0, profile.layout.num_boundaries - 1.0, LEFT, RIGHT)
    step = across(1) - across(0)
    ends = [x for e in profile.estimates if e.value is not None for x in (e.value, *(e.interval or ()))]
    up = _round_axis(min(ends, default=0.0), max(ends, default=1.0), DIMENSIONS, 5)
    ranks = _round_axis(0.0, max(*plan.ranks, plan.base_rank), RANKS, 4, least=1.0)
    lines, bands, dimensions, ticks = [], [], [], []
    first = 0
    for stack in profile.layout.stacks:
        boundaries = range(first, first + len(stack) + 1)
        points = [(across(b - 0.5), profile.estimates[b], b) for b in boundaries]
        lines.append(" ".join(f"{x},{up(e.value)}" for x, e, _ in points if e.value is not None))
        whole = [(x, *e.interval) for x, e, _ in points if e.value is not None and e.interval is not None]
        edge = [(x, high) for x, _, high in whole] + [(x, low) for x, low, _ in reversed(whole)]
        bands.append(" ".join(f"{x},{up(value)}" for x, value in edge))
        dimensions += [
            Mark(x, up(e.value), step, f"boundary {b}: dimension {e}") for x, e, b in points if e.value is not None
        ]
        every = math.ceil(len(stack) / MOST_TICKS)
        ticks += [Tick(across(first + i), str(i)) for i in range(0, len(stack), every)]
        first += len(stack) + 1
    return Chart(
        tuple(filter(None, lines)),
        tuple(filter(None, bands)),
        tuple(dimensions),
        tuple(_rank_marks(plan, across, ranks)),
        tuple(ticks),
        up.ticks(),
        ranks.ticks(),
        ranks(plan.base_rank),
    )


def _rank_marks(plan: RankPlan, across: _Axis, up: _Axis) -> Iterator[Mark]:
    layout = plan.profile.layout
    at = dict(zip((block.name for block in layout.blocks), layout.block_boundaries(), strict=True))
    changes = plan.rank_changes or (None,) * len(plan.ranks)
    for site, rank, change in zip(plan.sites, plan.ranks, changes, strict=True):
        differs = "" if change is None else f", may differ {change:.0%}"
        reach = across(1) - across(0)
        yield Mark(across(at[site.name][0]), up(rank), reach, f"{site.name}: rank {rank}{differs}", 1 - (change or 0))


def _round_axis(low: float, high: float, place: tuple[int, int], count: int, least: float = 0.0) -> _Axis:
    """An axis upward in a panel: from the last round number below `low` to the first above `high`.

    Its step is 1, 2 or 5 times a power of ten, no less than `least`, and goes up to `count` times into the range.
    """
    rough = max(high / count - low / count, least, 1e-9 * abs(high), 1e-300)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(times for times in (1, 2, 5, 10) if times * power >= rough)
    first = math.floor(low / step)
    top, bottom = place
    return _Axis(first * step, max(math.ceil(high / step), first + 1) * step, bottom, top, step)
