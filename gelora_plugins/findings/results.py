"""What the recorded runs of a comparison come to: results, what has none and why. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gelora_plugins import json_files
from gelora_plugins.errors import PlanError
from gelora_plugins.findings.arms import GRID, HEADROOM
from gelora_plugins.findings.record import diverged, made_of, read_lines
from gelora_plugins.findings.stats import Difference, mean_interval, paired_difference

Parts = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Tried:
    """What the search for a rate found at one rate.

    Attributes:
        loss: held-out loss over all seeds. Where fewer ran: that of the chosen rate and the mean difference from it, as
            each seed has rows of its own. None where one is no number.
        seeds, diverged: how many ran, and how many of them diverged.
    """

    rate: float
    loss: float | None
    seeds: int
    diverged: int


@dataclass(frozen=True)
class Around:
    """The seeds that judge, at another rate than that of the result.

    Attributes:
        scores: as of `Result`; None of one that diverged.
        as_good: whether this rate could as well have been chosen, see `rates.py`.
        parts: as of `Result`.
    """

    rate: float
    scores: tuple[float | None, ...]
    as_good: bool
    parts: Parts = ()

    @property
    def diverged(self) -> str:
        """How many of its seeds, "2 of 5"; empty where none has."""
        count = self.scores.count(None)
        return f"{count} of {len(self.scores)}" if count else ""

    def difference(self, result: Result) -> Difference | None:
        """Its scores less those of `result`, positive where they are better; None where seeds diverged."""
        sign = 1.0 if result.higher_is_better else -1.0
        here = [sign * score for score in self.scores if score is not None]
        return None if self.diverged else paired_difference(here, [sign * score for score in result.scores])


@dataclass(frozen=True)
class Result:
    """One method of one row on one task.

    Attributes:
        task, row, method: names.
        parameters: LoRA parameters counted on the trained model (mean over the seeds); all of them for "full".
        scores: one per seed; accuracy, mcc, f1 and spearman in hundredths, loss as it is.
        mean, half_width: of the scores, with half of the 95 % interval; None for one seed.
        rate: the learning rate that was chosen, or a lower one where seeds diverged there.
        diverged: "2 of 5 seeds diverged at 0.01" in that case, else empty.
        search: what was tried to choose the rate; empty where it was not chosen, or by the score of few seeds.
        why: of the choice, see `rates.Choice`.
        stable, cliff: the largest rate of the search at which every seed learned, and the next, where one diverged.
        around: the rates beside it at which the seeds ran too.
        seconds: of one training (mean), with what was measured before it: GeLoRA's probe, EVA's components.
        peak_memory: bytes, the highest of the seeds; None where unknown.
        ranks: one tuple per distinct recipe, one rank per block, of EVA the mean over the block's target modules;
            empty for the rest.
        parts: for each seed what each test row adds to the score, see `scoring.parts_of`; empty in older records.
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
    head_rate: float | None = None
    diverged: str = ""
    search: tuple[Tried, ...] = ()
    why: str = ""
    stable: float | None = None
    cliff: float | None = None
    around: tuple[Around, ...] = ()
    parts: Parts = ()

    @property
    def choosing_runs(self) -> int:
        """How many trainings chose its rate."""
        return sum(tried.seeds for tried in self.search)


@dataclass(frozen=True)
class Gap:
    """Why a method has no result on a task, or the task none at all; `unfinished` where the same command goes on."""

    task: str
    reason: str
    unfinished: bool

    def __str__(self) -> str:
        return f"{self.task}: {self.reason}"


def read_task(path: Path) -> tuple[Mapping[str, Any], list[Result], list[Gap]]:
    """(the experiment, results, what has none) of TASK/experiment.json and TASK/runs.jsonl.

    Random allocations are no methods, and not among them: see `headroom.py`.

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
        for method in row["methods"] if not row["name"].startswith(HEADROOM) else ():
            made = [lines[key] for key in method["keys"] if key in lines]
            missing = sum(key not in lines for key in _keys(method))
            if made and not missing and not any(map(diverged, made)):
                yield _result(experiment, row["name"], method, made, lines)
            else:
                yield _gap(experiment, row["name"], method, made, missing)


def _keys(method: Mapping[str, Any]) -> list[str]:
    """Of all runs that judge it: a difference is not known before its neighbours are, see `contrasts.py`."""
    return [*method["keys"], *(key for other in method.get("others", ()) for key in other["keys"])]


def _gap(
    experiment: Mapping[str, Any],
    row: str,
    method: Mapping[str, Any],
    made: Sequence[Mapping[str, Any]],
    missing: int,
) -> Gap:
    """A mean over the seeds that are left would not be comparable, so what they scored is only said."""
    total, scores = len(_keys(method)), [run["score"] for run in made if not diverged(run)]
    unfinished = missing > 0 or not total
    search = method.get("search")
    if search and search["chosen"] is None and not method.get("failure"):
        return Gap(experiment["task"]["name"], f"{row}, {method['name']}: {search['why']}.", unfinished=False)
    if method.get("failure"):
        reason = f"{method['failure']} Run the same command again to try it once more."
    elif unfinished:
        reason = f"{missing} of {total} runs are not done. Run the same command again; it goes on there."
    else:
        reason = f"{len(made) - len(scores)} of {len(made)} seeds diverged at its best rate, {method['rate']:g}. "
        reason += "Give lower rates."
    if scores:
        reason += f" The other scores: {', '.join(f'{unit_of(experiment) * score:.4g}' for score in scores)}."
    return Gap(experiment["task"]["name"], f"{row}, {method['name']}: {reason}", unfinished)


def _result(
    experiment: Mapping[str, Any],
    row: str,
    method: Mapping[str, Any],
    made: Sequence[Mapping[str, Any]],
    lines: Mapping[str, Mapping[str, Any]],
) -> Result:
    task, rates, search = experiment["task"], experiment["settings"]["rates"], method.get("search")
    scores = tuple(unit_of(experiment) * run["score"] for run in made)
    mean, half_width = mean_interval(scores)
    memory = [run["peak_memory"] for run in made]
    prepared = f"{row}/eva" if method["name"] == "eva" else row
    measured = method["name"] in ("eva", "permuted", "reversed", row)
    around = _around(experiment, method, lines)
    fallen = next((a for a in around if search and a.rate == search["chosen"]), None)
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
        rate_at_edge=search["at_edge"] if search else len(rates) > 1 and method["rate"] in (min(rates), max(rates)),
        seconds=statistics.fmean(run["seconds"] for run in made)
        + (experiment["seconds"].get(prepared, 0.0) if measured else 0.0),
        peak_memory=None if None in memory else max(memory),
        ranks=_ranks(experiment, row, method),
        head_rate=made[0].get("head_rate"),
        diverged="" if fallen is None else f"{fallen.diverged} seeds diverged at {fallen.rate:g}",
        search=_search(search, lines) if search else (),
        why=search["why"] if search else "",
        stable=search["stable"] if search else None,
        cliff=search["cliff"] if search else None,
        around=around,
        parts=_parts(made, unit_of(experiment)),
    )


def _parts(made: Sequence[Mapping[str, Any]], unit: float) -> Parts:
    found = [run.get("parts") for run in made]
    return () if None in found else tuple(tuple(unit * part for part in parts or ()) for parts in found)


def _around(
    experiment: Mapping[str, Any], method: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]
) -> tuple[Around, ...]:
    found = []
    for other in method.get("others", ()):
        made = [lines[key] for key in other["keys"]]
        scores = tuple(None if diverged(run) else unit_of(experiment) * run["score"] for run in made)
        as_good = other["rate"] in method["search"]["as_good"]
        found.append(Around(other["rate"], scores, as_good, _parts(made, unit_of(experiment))))
    return tuple(sorted(found, key=lambda around: around.rate))


def _search(search: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]) -> tuple[Tried, ...]:
    made = {run["rate"]: [lines[key] for key in run["keys"]] for run in search["runs"]}
    chosen = {run["seed"]: run["loss"] for run in made[search["chosen"]]}
    middle, found = statistics.fmean(chosen.values()), []
    for rate, runs in made.items():
        apart = [run["loss"] - chosen[run["seed"]] for run in runs if run["loss"] is not None]
        loss = middle + statistics.fmean(apart) if len(apart) == len(runs) else None
        found.append(Tried(rate, loss, len(runs), sum(map(diverged, runs))))
    return tuple(found)


def unit_of(experiment: Mapping[str, Any]) -> float:
    """What a score as recorded is multiplied by where it is shown."""
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
    worths = {}
    for row in experiment["rows"]:
        if row["name"].startswith(GRID):
            worth = _held_out(row["methods"][0], experiment, lines)
            if worth is None:
                return None
            worths[row["name"]] = worth
    return max(worths, key=lambda name: worths[name]) if worths else None


def _held_out(
    method: Mapping[str, Any], experiment: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]
) -> float | None:
    """What the runs at its rate came to that chose it, as higher is better: the loss; in older records the score."""
    if "search" in method:
        runs = [run["keys"] for run in method["search"]["runs"] if run["rate"] == method["rate"]]
        losses = [lines[key]["loss"] for keys in runs for key in keys]
        return -statistics.fmean(losses) if losses and None not in losses else None
    recipe, sign = method["recipes"][0], -1.0 if experiment["task"]["metric"] == "loss" else 1.0
    scores = [
        sign * line["score"]
        for key, line in lines.items()
        if line["choosing"] and (line["recipe"], line["rate"]) == (recipe, method["rate"])
        if not diverged(line) and made_of(line).key(experiment["identity"]) == key
    ]
    return statistics.fmean(scores) if scores else None


def _share(result: Result, best: Result) -> float | None:
    ours, theirs = (result.mean, best.mean) if result.higher_is_better else (best.mean, result.mean)
    return ours / theirs if min(ours, theirs) > 0 else None
