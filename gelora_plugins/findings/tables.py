"""The tables of a comparison as plain cells, for Markdown and for the page. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gelora_plugins.findings.arms import GRID
from gelora_plugins.text import markdown

if TYPE_CHECKING:
    from gelora_plugins.findings.contrasts import Contrast
    from gelora_plugins.findings.results import Around, Result

RESULTS = (
    "method",
    "parameters",
    "score",
    "of the chosen uniform rank's score",
    "of its parameters",
    "against uniform",
    "against permuted",
    "rate",
    "seconds",
    "peak MB",
)
RATES = ("method", "rate", "the next lower", "the next higher", "learns up to", "seeds diverge at", "runs that chose")
CONTRASTS = ("difference", "task", "verdict", "mean", "95 % interval", "corrected p", "smallest that could show")


def name_of(result: Result) -> str:
    """Row and method of a result in words; the row alone where that says both."""
    single = result.method == result.row or result.row.startswith(GRID)
    return result.row if single else f"{result.row}: {result.method}"


def result_cells(results: Sequence[Result], contrasts: Sequence[Contrast]) -> Iterator[tuple[str, ...]]:
    """For each result of one task what RESULTS names."""
    said = {(c.task, c.row, c.ours, c.theirs): c.verdict for c in contrasts}
    for result in results:
        of = (result.task, result.row, result.method)
        yield (
            name_of(result),
            f"{result.parameters:,.0f}",
            f"{result.mean:.4g}" + (f" ± {result.half_width:.2g}" if result.half_width is not None else ""),
            "" if result.share_of_best is None else f"{result.share_of_best:.1%}",
            "" if result.share_of_parameters is None else f"{result.share_of_parameters:.0%}",
            said.get((*of, "uniform"), ""),
            said.get((*of, "permuted"), ""),
            f"{result.rate:g}",
            f"{result.seconds:.0f}",
            "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
        )


def rate_cells(results: Sequence[Result]) -> Iterator[tuple[str, ...]]:
    """For each result whose rate was searched for what RATES names."""
    for result in (result for result in results if result.search):
        above = result.rate if not result.diverged else result.search[-1].rate
        sides = (
            [a for a in result.around if a.rate < result.rate][-1:],
            [a for a in result.around if a.rate > above][:1],
        )
        yield (
            f"{result.row}: {result.method}",
            f"{result.rate:g}",
            *(_beside(side[0], result) if side else "" for side in sides),
            "" if result.stable is None else f"{result.stable:g}",
            "" if result.cliff is None else f"{result.cliff:g}",
            str(result.choosing_runs),
        )


def contrast_cells(contrasts: Sequence[Contrast]) -> Iterator[tuple[str, ...]]:
    """For each contrast what CONTRASTS names."""
    for c in contrasts:
        d = c.difference
        ours = c.ours if c.ours == c.row else f"{c.row}: {c.ours}"
        yield (
            f"{ours} - {c.theirs}",
            c.task,
            c.verdict,
            f"{d.mean:+.3g}",
            "" if d.interval is None else f"{d.interval[0]:+.3g} to {d.interval[1]:+.3g}",
            f"{c.corrected_p:.2g}",
            "" if d.smallest is None else f"{d.smallest:.2g}",
        )


def markdown_table(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> str:
    """The first cell of each row as a name that others wrote."""
    lines = [columns, tuple("---" for _ in columns), *((markdown(name), *cells) for name, *cells in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def settings_line(experiment: Mapping[str, Any], searched: bool) -> str:
    """What a task was trained on and with, in one line."""
    task, settings = experiment["task"], experiment["settings"]
    drawn, rates = settings.get("rows_per_seed"), ", ".join(f"{rate:g}" for rate in settings["rates"])
    rows = f"{task['train_rows']:,}" if drawn is None else f"for each seed {drawn:,} of {task['train_rows']:,}"
    bits = " in 4 bits" if settings.get("load_in_4bit") else ""
    begin = "rates searched for from" if searched else "rates"
    return (
        f"{experiment['model']}{bits}, {rows} training rows, {task['test_rows']:,} test rows, "
        f"{settings['seeds']} seeds, {settings['epochs']} epochs, {begin} {rates}."
    )


def _beside(around: Around, result: Result) -> str:
    """ "0.003: -1.2 ± 0.5", or how many seeds diverged there."""
    difference = around.difference(result)
    if difference is None:
        return f"{around.rate:g}: {around.diverged} diverged"
    half = "" if difference.interval is None else f" ± {(difference.interval[1] - difference.interval[0]) / 2:.2g}"
    return f"{around.rate:g}: {difference.mean:+.2g}{half}"
