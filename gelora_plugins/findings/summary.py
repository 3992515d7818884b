"""What a comparison found: Comparison as JSON, Markdown and pictures. Reads recorded runs; needs no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gelora_plugins import json_files
from gelora_plugins.errors import PlanError
from gelora_plugins.findings import headroom
from gelora_plugins.findings.contrasts import Contrast, contrasts_of
from gelora_plugins.findings.headroom import Headroom, read_headroom
from gelora_plugins.findings.page import page
from gelora_plugins.findings.pictures import draw_pareto, draw_patterns, draw_rates
from gelora_plugins.findings.results import Gap, Result, read_task
from gelora_plugins.findings.stats import NOT_TOLD
from gelora_plugins.findings.tables import RATES, RESULTS, markdown_table, rate_cells, result_cells, settings_line
from gelora_plugins.text import markdown

WORDS = ("better", "worse", "equal", NOT_TOLD)  # what a verdict begins with
CAVEAT = (
    "Seeds vary the head, the adapter and the order of the rows, not the rows themselves: a difference may hold for "
    "these rows alone. Before you believe one, let each seed draw its own rows, or try it on others."
)
CAVEAT_DRAWN = (
    "Seeds vary the head, the adapter, the training rows and their order, not the test rows, nor the rows on which "
    "ranks were measured. Before you believe a difference, try it on other test rows."
)
CAVEAT_ROWS = (
    "Intervals take in the luck of the seeds and of the test rows, not of the training rows. Before you believe a "
    "difference, let each seed draw its own rows, or try it on others."
)
CAVEAT_ROWS_DRAWN = (
    "Intervals take in the luck of the seeds, with the training rows that each drew, and of the test rows; not that of "
    "the rows on which ranks were measured, nor of another task."
)
SEARCH = (
    "Each method's rate was chosen by the same search, by the loss on held-out training rows. Beside it: the scores of "
    "the seeds that judge at its neighbours, less those at the rate itself (positive is better).\n"
)


@dataclass(frozen=True)
class Comparison:
    """All tasks of one folder: results, contrasts, what has no result and why, what moving ranks could win, notes."""

    experiments: tuple[Mapping[str, Any], ...]
    results: tuple[Result, ...]
    contrasts: tuple[Contrast, ...]
    gaps: tuple[Gap, ...] = ()
    headrooms: tuple[Headroom, ...] = ()

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Comparison:
        """Sum up what is recorded in FOLDER/*/experiment.json and FOLDER/*/runs.jsonl.

        A method that is not finished, or diverged, and a task that cannot be read are among the gaps.

        Raises:
            PlanError: nothing is there that can be read.
        """
        paths = sorted(Path(folder).glob("*/experiment.json"))
        experiments: list[Mapping[str, Any]] = []
        results: list[Result] = []
        gaps: list[Gap] = []
        headrooms: list[Headroom] = []
        for path in paths:
            try:
                experiment, found, without = read_task(path)
                drawn, unfinished = read_headroom(path, experiment)
            except PlanError as error:
                gaps.append(Gap(path.parent.name, str(error), unfinished=False))
                continue
            name = experiment["task"]["name"]
            if name in (known["task"]["name"] for known in experiments):
                gaps.append(Gap(path.parent.name, f"its task is called {name}, as another here is.", unfinished=False))
                continue
            experiments.append(experiment)
            results += found
            headrooms += drawn
            gaps += [*without, *unfinished]
        if not experiments:
            reason = gaps[0].reason if gaps else "expected TASK/experiment.json in it."
            raise PlanError(f"{os.fspath(folder)} holds no comparison; {reason}")
        margins = {e["task"]["name"]: float(e["settings"]["margin"]) for e in experiments}
        contrasts = tuple(contrasts_of(results, margins))
        return cls(tuple(experiments), tuple(results), contrasts, tuple(gaps), tuple(headrooms))

    def contrast(self, task: str, row: str, ours: str, theirs: str) -> Contrast:
        """The contrast of two methods. Raises KeyError when there is none."""
        for contrast in self.contrasts:
            if (contrast.task, contrast.row, contrast.ours, contrast.theirs) == (task, row, ours, theirs):
                return contrast
        raise KeyError((task, row, ours, theirs))

    def lines(self) -> list[str]:
        """What is missing, verdicts and notes, one sentence each; before those of several tasks what they come to."""
        lines = [*map(str, self.gaps), *self._counts(), *map(str, (*self.headrooms, *self.contrasts))]
        for experiment in self.experiments:
            notes = [*_head(experiment), *experiment["notes"]]
            lines += [f"{experiment['task']['name']}: {note}" for note in notes]
        for result in self.results:
            name = f"{result.task}, {result.row}, {result.method}"
            if result.diverged:
                lines.append(f"{name}: {result.diverged}; its result is at {result.rate:g}, the next lower without.")
            elif result.why:
                lines.append(f"{name}: its rate is {result.rate:g}: {result.why}.")
        edge = [f"{r.task}, {r.row}, {r.method} ({r.rate:g})" for r in self.results if r.rate_at_edge]
        if edge:
            lines.append(f"The best learning rate was the lowest or highest of the grid for: {'; '.join(edge)}.")
        drawn = all(experiment["settings"].get("rows_per_seed") for experiment in self.experiments)
        if not self.contrasts:
            return lines
        if all(contrast.difference.rows for contrast in self.contrasts):
            return [*lines, CAVEAT_ROWS_DRAWN if drawn else CAVEAT_ROWS]
        return [*lines, CAVEAT_DRAWN if drawn else CAVEAT]

    def _counts(self) -> Iterator[str]:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for contrast in self.contrasts:
            groups.setdefault((contrast.row, contrast.ours, contrast.theirs), []).append(contrast.verdict)
        for (row, ours, theirs), verdicts in groups.items():
            if len(verdicts) > 1:
                counts = (f"{word} on {sum(v.startswith(word) for v in verdicts)}" for word in WORDS)
                yield f"{row}: {ours} against {theirs} over {len(verdicts)} tasks: {', '.join(counts)}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "schema": json_files.SCHEMA,
            "kind": "comparison_summary",
            "tasks": [
                {**experiment["task"], "model": experiment["model"], "settings": experiment["settings"]}
                for experiment in self.experiments
            ],
            "results": [_without_parts(asdict(result)) for result in self.results],
            "contrasts": [_without_no_rows(asdict(contrast)) for contrast in self.contrasts],
            "headroom": [{**asdict(h), "layout": h.layout and asdict(h.layout)} for h in self.headrooms],
            "lines": self.lines(),
        }

    def to_markdown(self) -> str:
        """One table per task, and the lines."""
        parts = ["# Comparison at equal LoRA parameters\n"]
        for experiment in self.experiments:
            task = experiment["task"]
            tables = self.rates_table(task["name"])
            line = markdown(settings_line(experiment, searched=bool(tables)))
            parts.append(f"## {markdown(task['name'])}: {task['metric']}\n\n{line}\n")
            parts.append(self.table(task["name"]))
            parts += tables
            for h in (h for h in self.headrooms if h.task == task["name"]):
                table = markdown_table(headroom.COLUMNS, h.cells())
                parts.append(f"Random allocations at the cost of {markdown(h.row)}, {h.parameters:,}:\n\n{table}")
        return "\n".join([*parts, *(f"- {markdown(line)}" for line in self.lines())]) + "\n"

    def table(self, task: str) -> str:
        """The results of a task as a Markdown table; methods at equal parameters stand together."""
        return markdown_table(RESULTS, result_cells(self.of(task), self.contrasts))

    def rates_table(self, task: str) -> list[str]:
        """What the searches for the rates of a task came to, as Markdown; nothing where none was made."""
        rows = list(rate_cells(self.of(task)))
        return [SEARCH, markdown_table(RATES, rows)] if rows else []

    def of(self, task: str) -> list[Result]:
        """The results of a task."""
        return [result for result in self.results if result.task == task]

    def to_html(self) -> str:
        """All of it as one page that needs no network and no other file; without its script no table can be sorted."""
        return page(self)

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write comparison.json, .md and .html and, where matplotlib is installed, the pictures."""
        directory = Path(folder)
        paths = [directory / f"comparison.{kind}" for kind in ("json", "md", "html")]
        json_files.write_json(paths[0], self.to_dict())
        json_files.write_text(paths[1], self.to_markdown())
        json_files.write_text(paths[2], self.to_html())
        if importlib.util.find_spec("matplotlib") is not None:
            paths += [directory / "pareto.png", directory / "patterns.png"]
            tasks = [experiment["task"] for experiment in self.experiments]
            draw_pareto(tasks, self.results, paths[3])
            draw_patterns(self.results, paths[4])
            if any(result.search for result in self.results):
                paths.append(directory / "rates.png")
                draw_rates(tasks, self.results, paths[5])
        return paths


def _without_parts(result: dict[str, Any]) -> dict[str, Any]:
    """As runs.jsonl has them, and they are long."""
    for each in (result, *result["around"]):
        del each["parts"]
    return result


def _without_no_rows(contrast: dict[str, Any]) -> dict[str, Any]:
    """As the contrasts of older records are, whose runs do not say what each test row adds."""
    if not contrast["difference"]["rows"]:
        del contrast["difference"]["rows"]
    return contrast


def _head(experiment: Mapping[str, Any]) -> Iterator[str]:
    """How the rate of what is trained beside the adapter was chosen."""
    head = experiment.get("head")
    if head is not None:
        runs, chosen = sum(len(run["keys"]) for run in head["runs"]), head["chosen"]
        beside = f"beside uniform rank {experiment['settings']['rank']} at {head['beside']:g}, by {runs} runs"
        yield (
            f"The head's rate is {chosen:g} for all methods: chosen {beside}."
            if chosen
            else (f"The head has the adapter's rate: {head['why']}, {beside}.")
        )
    elif experiment["settings"].get("head_rate"):
        yield f"The head's rate is {experiment['settings']['head_rate']:g} for all methods."
