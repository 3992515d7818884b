"""What a comparison found: Comparison as JSON, Markdown and pictures. Reads recorded runs; needs no torch."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gelora_plugins import records
from gelora_plugins.compare_stats import (
    Difference,
    holm,
    mean_interval,
    paired_difference,
    verdict,
)
from gelora_plugins.errors import PlanError
from gelora_plugins.text import markdown

GRID = "uniform r = "
WORDS = ("better", "equal", "worse")  # what a verdict begins with, when there is one
CAVEAT = (
    "Seeds vary the head, the adapter and the order of the rows, not the rows themselves: a difference may hold for "
    "these rows alone. Before you believe one, let each seed draw its own rows, or try it on others."
)
CAVEAT_DRAWN = (
    "Seeds vary the head, the adapter, the training rows and their order, not the test rows, nor the rows on which "
    "ranks were measured. Before you believe a difference, try it on other test rows."
)
CONTROLS = ("uniform", "permuted", "reversed", "eva", "adalora")
_COLUMNS = (
    "method",
    "parameters",
    "score",
    "of the best grid score",
    "at its parameters",
    "against uniform",
    "against permuted",
    "rate",
    "seconds",
    "peak MB",
)


@dataclass(frozen=True)
class Result:
    """One method of one row on one task.

    Attributes:
        task, row, method: names.
        parameters: LoRA parameters counted on the trained model (mean over the seeds); all of them for "full".
        scores: one per seed; accuracy, mcc, f1 and spearman in hundredths, loss as it is.
        mean, half_width: of the scores, with half of the 95 % interval; None for one seed.
        rate: the learning rate that was chosen.
        seconds: of one training (mean), with what was measured before it: GeLoRA's probe, EVA's components.
        peak_memory: bytes, the highest of the seeds; None where unknown.
        ranks: one tuple per distinct recipe, one rank per block, of EVA the mean over the block's target modules;
            empty for the rest.
        share_of_best, share_of_parameters: mean score and parameters beside those of the best uniform rank of the
            grid; None without a grid.
    """

    task: str
    row: str
    method: str
    higher_is_better: bool
    parameters: float
    scores: tuple[float, ...]
    mean: float
    half_width: float | None
    rate: float
    rate_at_edge: bool
    seconds: float
    peak_memory: int | None
    ranks: tuple[tuple[float, ...], ...]
    share_of_best: float | None = None
    share_of_parameters: float | None = None


@dataclass(frozen=True)
class Contrast:
    """Two methods of one row on one task: `ours` against `theirs`, paired by seed.

    Attributes:
        difference: positive when `ours` is better, whatever the metric.
        corrected_p: by Holm for the number of tasks that have this contrast.
        verdict: "better", "worse" or "equal within x".
    """

    task: str
    row: str
    ours: str
    theirs: str
    difference: Difference
    corrected_p: float
    verdict: str

    def __str__(self) -> str:
        d = self.difference
        if d.interval is None or d.smallest is None:
            return f"{self.task}, {self.row}: {self.ours} against {self.theirs}: {self.verdict}."
        said = f"{self.task}, {self.row}: {self.ours} is {_as_words(self.verdict, self.theirs)}"
        if d.interval == (0.0, 0.0):
            return f"{said}: the scores are the same."
        return (
            f"{said} (difference {d.mean:+.3g}, 95 % {d.interval[0]:+.3g} to {d.interval[1]:+.3g}, corrected p "
            f"{self.corrected_p:.2g}; the smallest difference that {d.seeds} seeds could have shown: {d.smallest:.2g})."
        )


def _as_words(verdict: str, theirs: str) -> str:
    if verdict.startswith("equal"):
        return verdict.replace("equal", f"equal to {theirs}")
    return f"{verdict} than {theirs}"


@dataclass(frozen=True)
class Comparison:
    """All tasks of one folder: results, contrasts, notes."""

    experiments: tuple[Mapping[str, Any], ...]
    results: tuple[Result, ...]
    contrasts: tuple[Contrast, ...]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Comparison:
        """Sum up what is recorded in FOLDER/*/experiment.json and FOLDER/*/runs.jsonl.

        Raises:
            PlanError: nothing is there, or a task is not finished.
        """
        paths = sorted(Path(folder).glob("*/experiment.json"))
        if not paths:
            raise PlanError(f"{os.fspath(folder)} holds no comparison; expected TASK/experiment.json in it.")
        experiments = [records.read_json(path) for path in paths]
        margins = {e["task"]["name"]: float(e["settings"]["margin"]) for e in experiments}
        results: list[Result] = []
        for experiment, path in zip(experiments, paths, strict=True):
            lines = path.with_name("runs.jsonl").read_text(encoding="utf-8").splitlines()
            runs = {run["key"]: run for run in map(json.loads, lines)}
            results += _with_shares(list(_results(experiment, runs)))
        return cls(tuple(experiments), tuple(results), tuple(_contrasts(results, margins)))

    def contrast(self, task: str, row: str, ours: str, theirs: str) -> Contrast:
        """The contrast of two methods. Raises KeyError when there is none."""
        for contrast in self.contrasts:
            if (contrast.task, contrast.row, contrast.ours, contrast.theirs) == (task, row, ours, theirs):
                return contrast
        raise KeyError((task, row, ours, theirs))

    def lines(self) -> list[str]:
        """Verdicts and notes, one sentence each; where there are several tasks, first what the verdicts come to."""
        lines = [*self._counts(), *map(str, self.contrasts)]
        for experiment in self.experiments:
            lines += [f"{experiment['task']['name']}: {note}" for note in experiment["notes"]]
        edge = [f"{r.task}, {r.row}, {r.method} ({r.rate:g})" for r in self.results if r.rate_at_edge]
        if edge:
            lines.append(f"The best learning rate was the lowest or highest of the grid for: {'; '.join(edge)}.")
        drawn = all(experiment["settings"].get("rows_per_seed") for experiment in self.experiments)
        return [*lines, CAVEAT_DRAWN if drawn else CAVEAT] if self.contrasts else lines

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
            "schema": records.SCHEMA,
            "kind": "comparison_summary",
            "tasks": [
                {**experiment["task"], "model": experiment["model"], "settings": experiment["settings"]}
                for experiment in self.experiments
            ],
            "results": [asdict(result) for result in self.results],
            "contrasts": [asdict(contrast) for contrast in self.contrasts],
            "lines": self.lines(),
        }

    def to_markdown(self) -> str:
        """One table per task, and the lines."""
        parts = ["# Comparison at equal LoRA parameters\n"]
        for experiment in self.experiments:
            task, settings, rows = experiment["task"], experiment["settings"], _train_rows(experiment)
            parts.append(
                f"## {markdown(task['name'])}: {task['metric']}\n\n{markdown(experiment['model'])}, {rows} training "
                f"rows, {task['test_rows']:,} test rows, {settings['seeds']} seeds, {settings['epochs']} epochs, rates "
                f"{', '.join(f'{rate:g}' for rate in settings['rates'])}.\n"
            )
            parts.append(self.table(task["name"]))
        return "\n".join([*parts, *(f"- {markdown(line)}" for line in self.lines())]) + "\n"

    def table(self, task: str) -> str:
        """The results of a task as a Markdown table; methods at equal parameters stand together."""
        rows = [_COLUMNS, tuple("---" for _ in _COLUMNS)]
        said = {(c.row, c.ours, c.theirs): c.verdict for c in self.contrasts if c.task == task}
        for result in (result for result in self.results if result.task == task):
            single = result.method == result.row or result.row.startswith(GRID)
            rows.append(
                (
                    markdown(result.row if single else f"{result.row}: {result.method}"),
                    f"{result.parameters:,.0f}",
                    f"{result.mean:.4g}" + (f" ± {result.half_width:.2g}" if result.half_width is not None else ""),
                    "" if result.share_of_best is None else f"{result.share_of_best:.1%}",
                    "" if result.share_of_parameters is None else f"{result.share_of_parameters:.0%}",
                    said.get((result.row, result.method, "uniform"), ""),
                    said.get((result.row, result.method, "permuted"), ""),
                    f"{result.rate:g}",
                    f"{result.seconds:.0f}",
                    "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}",
                )
            )
        return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"

    def write(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write comparison.json, comparison.md and, where matplotlib is installed, pareto.png and patterns.png."""
        directory = Path(folder)
        paths = [directory / "comparison.json", directory / "comparison.md"]
        records.write_json(paths[0], self.to_dict())
        records.write_text(paths[1], self.to_markdown())
        if importlib.util.find_spec("matplotlib") is not None:
            from gelora_plugins.compare_pictures import draw_pareto, draw_patterns

            paths += [directory / "pareto.png", directory / "patterns.png"]
            draw_pareto(self, paths[2])
            draw_patterns(self, paths[3])
        return paths


def _train_rows(experiment: Mapping[str, Any]) -> str:
    drawn, rows = experiment["settings"].get("rows_per_seed"), experiment["task"]["train_rows"]
    return f"{rows:,}" if drawn is None else f"for each seed {drawn:,} of {rows:,}"


def _results(experiment: Mapping[str, Any], runs: Mapping[str, Mapping[str, Any]]) -> Iterator[Result]:
    task, rates = experiment["task"], experiment["settings"]["rates"]
    for row in experiment["rows"]:
        for method in row["methods"]:
            missing = [key for key in method["keys"] if key not in runs]
            if missing:
                raise PlanError(
                    f"{task['name']}: {len(missing)} runs of {row['name']}, {method['name']} are not done. Run the "
                    "same command again; it goes on where it was."
                )
            made = [runs[key] for key in method["keys"]]
            if any(run["score"] is None for run in made):
                raise PlanError(
                    f"{task['name']}: {row['name']}, {method['name']} diverged at its best rate, {method['rate']:g}. "
                    "Give lower rates."
                )
            unit = 1.0 if task["metric"] == "loss" else 100.0
            scores = tuple(unit * run["score"] for run in made)
            mean, half_width = mean_interval(scores)
            memory = [run["peak_memory"] for run in made]
            prepared = f"{row['name']}/eva" if method["name"] == "eva" else row["name"]
            measured = method["name"] in ("eva", "permuted", "reversed", row["name"])
            yield Result(
                task=task["name"],
                row=row["name"],
                method=method["name"],
                higher_is_better=task["metric"] != "loss",
                parameters=statistics.fmean(run["lora_parameters"] for run in made),
                scores=scores,
                mean=mean,
                half_width=half_width,
                rate=method["rate"],
                rate_at_edge=len(rates) > 1 and method["rate"] in (min(rates), max(rates)),
                seconds=statistics.fmean(run["seconds"] for run in made)
                + (experiment["seconds"].get(prepared, 0.0) if measured else 0.0),
                peak_memory=None if None in memory else max(memory),
                ranks=_ranks(experiment, row["name"], method),
            )


def _ranks(experiment: Mapping[str, Any], row: str, method: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
    if method["name"] == "eva":
        found = experiment["eva_ranks"][row]
        blocks = ([rank for name, rank in found.items() if name.startswith(f"{b}.")] for b in experiment["blocks"])
        return (tuple(statistics.fmean(ranks) for ranks in blocks),)
    return tuple(tuple(recipe["ranks"]) for recipe in method["recipes"] if recipe["ranks"])


def _with_shares(results: Sequence[Result]) -> list[Result]:
    grid = [result for result in results if result.row.startswith(GRID)]
    if not grid:
        return list(results)
    best = max(grid, key=lambda result: result.mean if result.higher_is_better else -result.mean)
    return [
        replace(
            result,
            share_of_best=result.mean / best.mean if best.mean else None,
            share_of_parameters=result.parameters / best.parameters,
        )
        for result in results
    ]


def _contrasts(results: Sequence[Result], margins: Mapping[str, float]) -> Iterator[Contrast]:
    """The plan against each control, and each control against uniform; the p values corrected over the tasks."""
    found: dict[tuple[str, str, str], list[tuple[str, Difference]]] = {}
    at = {(result.task, result.row, result.method): result for result in results}
    for task, row in dict.fromkeys((result.task, result.row) for result in results):
        pairs = [(row, control) for control in CONTROLS]
        pairs += [(control, "uniform") for control in CONTROLS if control != "uniform"]
        for ours, theirs in pairs:
            if (task, row, ours) in at and (task, row, theirs) in at:
                found.setdefault((row, ours, theirs), []).append(
                    (task, _difference(at[task, row, ours], at[task, row, theirs]))
                )
    for (row, ours, theirs), by_task in found.items():
        corrected = holm([difference.p for _, difference in by_task])
        for (task, difference), p in zip(by_task, corrected, strict=True):
            yield Contrast(task, row, ours, theirs, difference, p, verdict(difference, p, margins[task]))


def _difference(ours: Result, theirs: Result) -> Difference:
    sign = 1.0 if ours.higher_is_better else -1.0
    return paired_difference([sign * score for score in ours.scores], [sign * score for score in theirs.scores])
