"""The pictures of a comparison: score against parameters, the rank patterns, loss and score against the rate.

Needs matplotlib.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gelora_plugins.findings.stats import mean_interval, pareto
from gelora_plugins.text import label

if TYPE_CHECKING:
    from gelora_plugins.findings.results import Result

    Tasks = Sequence[Mapping[str, Any]]  # as in experiment.json


def draw_pareto(tasks: Tasks, found: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Mean score with its 95 % interval against trained parameters; a line joins what nothing else beats."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(8, 4.5 * len(tasks)), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
        results = [result for result in found if result.task == task["name"]]
        sign = 1.0 if task["metric"] != "loss" else -1.0
        front = pareto([(result.parameters, sign * result.mean) for result in results])
        line = sorted((results[i].parameters, results[i].mean) for i in front)
        axes.plot(*zip(*line, strict=True), color="gray", linewidth=1, zorder=0)
        rows = list(dict.fromkeys(r.row for r in results if r.row != "full" and not r.row.startswith("uniform r = ")))
        for cost in {result.parameters for result in results}:
            group = {(r.scores, r.rate): r for r in reversed(results) if r.parameters == cost}  # a training stands once
            for i, result in enumerate(reversed(group.values())):
                color = f"C{rows.index(result.row)}" if result.row in rows else "black"
                x = cost * 1.14 ** (i - (len(group) - 1) / 2)  # side by side, or they would hide each other
                half = result.half_width or 0.0
                axes.errorbar(x, result.mean, yerr=half, fmt="o", markersize=4, capsize=2, color=color)
                name = result.row if result.method == result.row or result.row not in rows else result.method
                axes.annotate(
                    label(name.removeprefix("uniform ")),
                    (x, result.mean + half),
                    xytext=(0, 3),
                    textcoords="offset points",
                    fontsize=7,
                    rotation=70,
                    color=color,
                )
        axes.margins(y=0.2)
        axes.set_xscale("log")
        axes.set_xlabel("trained parameters, without the head; equal ones stand side by side")
        axes.set_ylabel(task["metric"])
        axes.set_title(f"{label(task['name'])} ({task['train_rows']} training rows)")
    figure.savefig(path, dpi=120)


def draw_patterns(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """The rank of every block, a line per method and order, a panel per task and row; of EVA the mean of the block."""
    from matplotlib.figure import Figure

    panels = []
    for task, row in dict.fromkeys((result.task, result.row) for result in results):
        lines = [
            (result.method, ranks)
            for result in results
            if (result.task, result.row) == (task, row)
            for ranks in result.ranks
        ]
        if len(lines) > 1:
            panels.append((f"{task}: {row}", lines))
    heights = [len(lines) for _, lines in panels] or [1]
    figure = Figure(figsize=(8, 1 + 0.3 * sum(heights) + 0.6 * len(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (title, lines) in zip(axes, panels, strict=False):
        ax.imshow([ranks for _, ranks in lines], aspect="auto", cmap="Blues", vmin=0)
        ax.set_yticks(range(len(lines)), [label(name) for name, _ in lines], fontsize=7)
        ax.set_xticks([])
        ax.set_title(label(title), fontsize=9)
        for y, (_, ranks) in enumerate(lines):
            for x, rank in enumerate(ranks):
                dark = rank > 0.6 * max(max(other) for _, other in lines)
                ax.text(x, y, f"{rank:.3g}", ha="center", va="center", fontsize=6, color="white" if dark else "black")
    axes[-1].set_xlabel("block")
    figure.savefig(path, dpi=120)


def draw_rates(tasks: Tasks, results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Held-out loss against the rate for each method, and the scores at its rate and beside it, a row per task.

    A cross is a rate at which a seed diverged, a ring the chosen one; the bars are 95 % intervals over the seeds.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    searched = _searched(results)
    tasks = [task for task in tasks if any(task["name"] == r.task for r in searched)]
    figure = Figure(figsize=(11, 4.5 * len(tasks)), layout="constrained")
    for (losses, scores), task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        for i, result in enumerate(r for r in searched if r.task == task["name"]):
            color, name = f"C{i % 10}", label(f"{result.row}: {result.method}")
            learned = [(t.rate, t.loss) for t in result.search if not t.diverged and t.loss is not None]
            losses.plot(*zip(*learned, strict=True), ".-", color=color, linewidth=1, label=name)
            gone = [t.rate for t in result.search if t.diverged]
            losses.plot(gone, [1.0 - 0.03 * i] * len(gone), "x", color=color, transform=losses.get_xaxis_transform())
            at = {rate: loss for rate, loss in learned if rate == result.rate}
            losses.plot(at.keys(), at.values(), "o", color=color, markersize=9, fillstyle="none")
            whole = [(a.rate, [s for s in a.scores if s is not None]) for a in result.around if not a.diverged]
            points = sorted([*whole, (result.rate, list(result.scores))])
            means = [mean_interval(values) for _, values in points]
            shifted = [rate * 1.02**i for rate, _ in points]  # or they would hide each other
            scores.errorbar(
                shifted, [m for m, _ in means], yerr=[h or 0.0 for _, h in means], fmt=".-", capsize=2, color=color
            )
            scores.plot(result.rate * 1.02**i, result.mean, "o", color=color, markersize=9, fillstyle="none")
        for axes, what in ((losses, "held-out loss, means over the seeds that choose"), (scores, task["metric"])):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # of less than a decade, too
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_tick_params(labelsize=8)
            axes.set_xlabel("learning rate of the adapter")
            axes.set_ylabel(what)
        losses.set_title(label(task["name"]))
        losses.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def _searched(results: Sequence[Result]) -> list[Result]:
    """The results with a search, each training once."""
    return list({(r.task, r.search, r.rate, r.scores): r for r in reversed(results) if r.search}.values())[::-1]
