"""The picture of a plan: dimensions above, ranks below. Needs matplotlib."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gelora_plugins import json_files
from gelora_plugins.ranks.verdict import verdict
from gelora_plugins.report.chart import caption
from gelora_plugins.text import label

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from gelora_plugins.dimension.profile import DimensionProfile
    from gelora_plugins.ranks.plan import RankPlan


def draw(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """Save `figure(plan)` as PNG, SVG or PDF by the suffix.

    Raises:
        ImportError: matplotlib is not installed.
    """
    json_files.write_bytes(path, _saved(figure(plan), Path(path).suffix[1:]))


def figure(plan: RankPlan) -> Figure:
    """The dimension at every boundary with its interval above, the ranks below, the verdict as the title.

    A rank is the paler, the more of the redraws have another.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no window, no global state, whatever backend the user has
    except ImportError as error:
        raise ImportError('The picture of a plan needs matplotlib: pip install "gelora[plot]".') from error

    picture = Figure(figsize=(8, 5), layout="constrained")
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_dimensions(plan.profile, above)
    _draw_ranks(plan, below)
    picture.suptitle(label(verdict(plan)), fontsize="medium", wrap=True)
    picture.supxlabel(label(caption(plan)), fontsize="small", color="dimgray", wrap=True)
    below.set_xlabel("block (each boundary lies between two blocks)")
    # A notebook shows no Figure that pyplot has not made, unless it has this (matplotlib 3.11, IPython 9).
    vars(picture)["_repr_png_"] = partial(_saved, picture, "png")
    return picture


def pixels(plan: RankPlan) -> np.ndarray:
    """`figure(plan)` as (height, width, 4) uint8, red, green, blue and opacity.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure(plan))
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def _saved(picture: Figure, kind: str) -> bytes:
    drawn = io.BytesIO()
    picture.savefig(drawn, format=kind, dpi=120)
    return drawn.getvalue()


def _draw_dimensions(profile: DimensionProfile, axes: Any) -> None:
    first = 0
    for stack in profile.layout.stacks:
        boundaries = range(first, first + len(stack) + 1)
        known = [(b, e) for b in boundaries if (e := profile.estimates[b]).value is not None]
        x = [b - 0.5 for b, _ in known]
        axes.plot(x, [e.value for _, e in known], color="tab:blue", marker="o", markersize=3)
        intervals = [(b - 0.5, *e.interval) for b, e in known if e.interval is not None]
        if intervals:
            axes.fill_between(*zip(*intervals, strict=True), color="tab:blue", alpha=0.2, linewidth=0)
        first += len(stack) + 1
    axes.set_ylabel("intrinsic dimension")


def _draw_ranks(plan: RankPlan, axes: Any) -> None:
    at = dict(zip((b.name for b in plan.profile.layout.blocks), plan.profile.layout.block_boundaries(), strict=True))
    bars = axes.bar([at[site.name][0] for site in plan.sites], plan.ranks, color="tab:orange", width=0.8)
    for bar, change in zip(bars, plan.rank_changes, strict=bool(plan.rank_changes)):
        bar.set_alpha(_paleness(change))
    if plan.rank_changes:
        for change in (0.0, 0.5, 1.0):
            axes.bar(0, 0, color="tab:orange", alpha=_paleness(change), label=f"{change:.0%}")
        axes.legend(title="may differ", ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    axes.axhline(plan.base_rank, color="gray", linestyle="--", linewidth=1)
    axes.text(1.0, plan.base_rank, f" r = {plan.base_rank}", transform=axes.get_yaxis_transform(), color="gray")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("LoRA rank")


def _paleness(change: float) -> float:
    return 1 - 0.75 * change
