"""What the recorded runs of a comparison come to: results, what has none and why, contrasts. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gelora_plugins import json_files
from gelora_plugins.compare.allocations import GRID, Recipe
from gelora_plugins.compare.record import choosing_runs, diverged, read_lines, worth_of_rates
from gelora_plugins.compare.stats import NOT_TOLD, Difference, holm, mean_interval, paired_difference, verdict
from gelora_plugins.errors import PlanError

CONTROLS = ("uniform", "permuted", "reversed", "eva", "adalora")


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
        share_of_best, share_of_parameters: mean score and parameters beside those of the uniform rank that a search
            over the grid takes: the best on the training rows that are held out while rates are chosen. Of losses the
            other way round, so that less than 1 is worse. None where there is no grid, or one rate.
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
class Gap:
    """Why a method has no result on a task, or the task none at all; `unfinished` where the same command goes on."""

    task: str
    reason: str
    unfinished: bool

    def __str__(self) -> str:
        return f"{self.task}: {self.reason}"


@dataclass(frozen=True)
class Contrast:
    """Two methods of one row on one task: `ours` against `theirs`, paired by seed.

    Attributes:
        difference: positive when `ours` is better, whatever the metric.
        corrected_p: by Holm for the number of tasks that have this contrast.
        verdict: "better", "worse", "not told apart", or "equal within x", where x is within the margin.
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
    if verdict == NOT_TOLD:
        return f"{verdict} from {theirs}"
    return f"{verdict} than {theirs}"


def read_task(path: Path) -> tuple[Mapping[str, Any], list[Result], list[Gap]]:
    """(the experiment, results, what has none) of TASK/experiment.json and TASK/runs.jsonl.

    Raises:
        PlanError: one of the files is damaged.
    """
    experiment = json_files.read_json(path)
    lines = read_lines(path.with_name("runs.jsonl"))
    try:
        if experiment["kind"] != "comparison":
            raise PlanError(f"{path} has kind {experiment['kind']!r}; expected 'comparison'.")
        found = list(_outcomes(experiment, lines))
        results = _with_shares([result for result in found if isinstance(result, Result)], experiment, lines)
    except (KeyError, TypeError) as error:
        raise PlanError(f"{path} is no record of a comparison: {type(error).__name__} {error}.") from error
    return experiment, results, [gap for gap in found if isinstance(gap, Gap)]


def _outcomes(experiment: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]) -> Iterator[Result | Gap]:
    for row in experiment["rows"]:
        for method in row["methods"]:
            made = [lines[key] for key in method["keys"] if key in lines]
            if made and len(made) == len(method["keys"]) and not any(map(diverged, made)):
                yield _result(experiment, row["name"], method, made)
            else:
                yield _gap(experiment, row["name"], method, made)


def _gap(experiment: Mapping[str, Any], row: str, method: Mapping[str, Any], made: Sequence[Mapping[str, Any]]) -> Gap:
    """A mean over the seeds that are left would not be comparable, so what they scored is only said."""
    total, scores = len(method["keys"]), [run["score"] for run in made if not diverged(run)]
    unfinished = len(made) < total or not total
    if method.get("failure"):
        reason = f"{method['failure']} Run the same command again to try it once more."
    elif unfinished:
        reason = f"{total - len(made)} of {total} runs are not done. Run the same command again; it goes on there."
    else:
        reason = f"{total - len(scores)} of {total} seeds diverged at its best rate, {method['rate']:g}. "
        reason += "Give lower rates."
    if scores:
        reason += f" The other scores: {', '.join(f'{_unit(experiment) * score:.4g}' for score in scores)}."
    return Gap(experiment["task"]["name"], f"{row}, {method['name']}: {reason}", unfinished)


def _result(
    experiment: Mapping[str, Any], row: str, method: Mapping[str, Any], made: Sequence[Mapping[str, Any]]
) -> Result:
    task, rates = experiment["task"], experiment["settings"]["rates"]
    scores = tuple(_unit(experiment) * run["score"] for run in made)
    mean, half_width = mean_interval(scores)
    memory = [run["peak_memory"] for run in made]
    prepared = f"{row}/eva" if method["name"] == "eva" else row
    measured = method["name"] in ("eva", "permuted", "reversed", row)
    return Result(
        task=task["name"],
        row=row,
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
        ranks=_ranks(experiment, row, method),
    )


def _unit(experiment: Mapping[str, Any]) -> float:
    return 1.0 if experiment["task"]["metric"] == "loss" else 100.0


def _ranks(experiment: Mapping[str, Any], row: str, method: Mapping[str, Any]) -> tuple[tuple[float, ...], ...]:
    if method["name"] == "eva":
        found = experiment["eva_ranks"][row]
        blocks = ([rank for name, rank in found.items() if name.startswith(f"{b}.")] for b in experiment["blocks"])
        return (tuple(statistics.fmean(ranks) for ranks in blocks),)
    return tuple(tuple(recipe["ranks"]) for recipe in method["recipes"] if recipe["ranks"])


def _with_shares(
    results: Sequence[Result], experiment: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]
) -> list[Result]:
    chosen = _chosen_of_grid(experiment, lines)
    best = next((result for result in results if result.row == chosen), None)
    if best is None:
        return list(results)
    return [
        replace(result, share_of_best=_share(result, best), share_of_parameters=result.parameters / best.parameters)
        for result in results
    ]


def _chosen_of_grid(experiment: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The row of the uniform rank that is best, at its best rate, on the training rows that are held out."""
    settings, worths = experiment["settings"], {}
    for row in experiment["rows"]:
        if row["name"].startswith(GRID):
            recipe = Recipe.from_dict(row["methods"][0]["recipes"][0])
            runs = choosing_runs(row["name"], "uniform", recipe, settings["rates"], settings["rate_seeds"])
            higher_is_better = experiment["task"]["metric"] != "loss"
            rates = worth_of_rates(runs, experiment["identity"], lines, higher_is_better)
            if not rates:
                return None
            worths[row["name"]] = max(rates.values())
    return max(worths, key=lambda name: worths[name]) if worths else None


def _share(result: Result, best: Result) -> float | None:
    ours, theirs = (result.mean, best.mean) if result.higher_is_better else (best.mean, result.mean)
    return ours / theirs if min(ours, theirs) > 0 else None


def contrasts_of(results: Sequence[Result], margins: Mapping[str, float]) -> Iterator[Contrast]:
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
