"""`gelora compare`: methods at equal LoRA parameters, trained and scored alike. Goes on where it was stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from gelora_plugins import records
from gelora_plugins.compare_bench import Bench, Settings, digest
from gelora_plugins.compare_methods import Method, Recipe, Row, grid_rows, plan_row
from gelora_plugins.compare_report import Comparison
from gelora_plugins.compare_tasks import Task
from gelora_plugins.compare_training import measure_eva, run
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.dimension import DimensionProfile
from gelora_plugins.errors import PlanError
from gelora_plugins.pipeline import measure
from gelora_plugins.policies import make_plan
from gelora_plugins.ranks import RankPlan
from gelora_plugins.report import versions

BYTES_PER_TRAINED = 16  # float32 weight, gradient, and AdamW's two moments
Train = Callable[[Sequence["Run"]], Iterator[tuple["Run", dict[str, Any]]]]


@dataclass(frozen=True)
class Run:
    """One training: a recipe, a seed and a rate, to choose the rate or for the result. `row` and `method` name it."""

    row: str
    method: str
    recipe: Recipe
    seed: int
    rate: float
    choosing: bool

    def key(self, identity: Mapping[str, Any]) -> str:
        """What the run is told by: everything that its score depends on, and no names."""
        return digest([identity, self.recipe.to_dict(), self.seed, self.rate, self.choosing])[:24]


def compare(
    model: str,
    task: Task,
    output: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    config: GeLoRAConfig | None = None,
    plans: Mapping[str, RankPlan] | None = None,
    keep_alpha: Iterable[str] = (),
    jobs: int = 1,
    progress: bool = True,
) -> Comparison:
    """Train every method with every seed on `task`, and sum up. A run that is recorded in `output` is not made again.

    Writes OUTPUT/TASK/runs.jsonl, one line per run as it ends, and OUTPUT/TASK/experiment.json, what is compared.

    Args:
        model: directory or hub id of the pretrained model.
        task: rows to train on, rows to score on.
        output: folder of one comparison; several tasks may share it.
        settings: how every method is trained.
        config: options of the probe, for the default plans.
        plans: allocations to compare, each in a row of its own with its controls. Default: `default_plans`.
        keep_alpha: names of plans that are trained with one lora_alpha instead of one scaling.
        jobs: processes that train at the same time, each with its share of the cores.

    Returns:
        The comparison of all tasks in `output`.

    Raises:
        PlanError: methods of a row are not at equal parameters, or runs.jsonl is damaged.
        GeLoRAError: the task, the model or an option cannot be used.
    """
    settings = settings or Settings()
    bench = Bench(model, task, settings, Path(output) / task.name)
    if plans is None:
        plans = default_plans(bench, config or GeLoRAConfig(), progress=progress)
    rows, facts = design(bench, plans, frozenset(keep_alpha))
    record = Record(bench.folder / "runs.jsonl", bench.identity)
    choosing, plain = _runs(rows, settings)
    total = len({run.key(bench.identity) for run in choosing + plain})
    with _workers(bench, jobs) as train, tqdm(total=total, desc=task.name, unit="run", disable=not progress) as bar:
        record.make(choosing, train, bar)
        rates = {
            (row.name, method.name): _best_rate(record, choosing, method.recipes[0], task, settings)
            for row in rows
            for method in row.methods
        }
        finals = [replace(made, rate=rates[made.row, made.method]) for made in plain]
        records.write_json(bench.folder / "experiment.json", _experiment(bench, rows, facts, finals, rates))
        record.make(finals, train, bar)
    return Comparison.read(output)


def _runs(rows: Sequence[Row], settings: Settings) -> tuple[list[Run], list[Run]]:
    """The runs that choose the rates, and those for the result, whose rates are still 0. Seed by seed, so that a
    comparison that is stopped has as many seeds of one method as of another.
    """
    pairs = [(row, method) for row in rows for method in row.methods]
    choosing = [
        Run(row.name, method.name, method.recipes[0], seed, rate, choosing=True)
        for row, method in pairs
        for rate in settings.rates
        for seed in range(settings.rate_seeds)
        if len(settings.rates) > 1
    ]
    finals = [
        Run(row.name, method.name, method.recipe(seed), seed, 0.0, choosing=False)
        for seed in range(settings.seeds)
        for row, method in pairs
    ]
    return choosing, finals


def default_plans(bench: Bench, config: GeLoRAConfig, *, progress: bool = True) -> dict[str, RankPlan]:
    """ "published", the policy `gelora`, and "budget", the same need at the cost of the settings' own rank."""
    profile = measured(bench, config, progress=progress)
    return {name: planned(bench, profile, config, policy) for name, policy in PLANS.items()}


PLANS = {"published": "gelora", "budget": "budget"}


def planned(bench: Bench, profile: DimensionProfile, config: GeLoRAConfig, policy: str) -> RankPlan:
    """The plan of `policy` for the target modules of `bench`."""
    options = GeLoRAConfig.from_dict({**config.to_dict(), "policy": policy})
    return make_plan(profile, options, bench.sites, bench.settings.rank, lora_alpha=float(bench.settings.lora_alpha))


def measured(bench: Bench, config: GeLoRAConfig, *, progress: bool = True) -> DimensionProfile:
    """The dimension profile of the training rows of `bench`: measured once, then read."""
    path = bench.cache / f"profile-{digest(config.to_dict())[:12]}.json"
    if path.is_file():
        return DimensionProfile.from_dict(records.read_json(path))
    rows = [{name: row[name] for name in row if name != "labels"} for row in bench.train]
    profile = measure(bench.load(0), rows, config, layout=bench.layout, progress=progress)
    records.write_json(path, profile.to_dict())
    return profile


def design(
    bench: Bench, plans: Mapping[str, RankPlan], keep_alpha: frozenset[str] = frozenset()
) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """The rows of a comparison, and facts for its report: what each preparation took, EVA's ranks, what is left out.

    Raises:
        PlanError: methods of a row are not at equal parameters.
    """
    settings, notes = bench.settings, []
    rows, seconds, eva = [], {}, {}
    one_size = len({linear.in_features + linear.out_features for linear in bench.targets.values()}) == 1
    if "adalora" in settings.methods and not one_size:
        notes.append(
            "AdaLoRA is left out: it spends ranks, and here a rank costs more in some target modules than in others, "
            "so what it will cost is not known before it is trained. Name target modules of one size to have it."
        )
    for name, plan in plans.items():
        plan.check_sites(bench.sites)
        seconds[name] = plan.profile.seconds
        adaptive = {}
        if "eva" in settings.methods:
            try:
                adaptive["eva"], eva[name], seconds[f"{name}/eva"] = measure_eva(bench, plan.num_parameters)
            except PlanError as error:
                notes.append(f"{name}: EVA is left out. {error}")
        if "adalora" in settings.methods and one_size:
            cost = next(iter(bench.targets.values()))
            per_rank = cost.in_features + cost.out_features
            budget = plan.num_parameters // per_rank
            adaptive["adalora"] = Recipe("adalora", budget * per_rank, budget=budget)
            notes.append(f"{name}: AdaLoRA trains with 1.5 times these parameters at first, and ends with as many.")
        row = plan_row(name, plan, settings.methods, settings.seeds, adaptive, keep_alpha=name in keep_alpha)
        rows.append(row)
        notes += row.notes
    if "grid" in settings.methods:
        rows += grid_rows(settings.grid, bench.sites)
    if "full" in settings.methods:
        free = _free_memory()
        if free is None or BYTES_PER_TRAINED * bench.num_parameters < free:
            rows.append(Row("full", (Method("full", (Recipe("full", bench.num_parameters),)),)))
        else:
            notes.append(f"Full fine-tuning is left out: its {bench.num_parameters:,} parameters do not fit in memory.")
    return tuple(rows), {"notes": notes, "seconds": seconds, "eva_ranks": eva}


def _experiment(
    bench: Bench,
    rows: Sequence[Row],
    facts: Mapping[str, Any],
    finals: Sequence[Run],
    rates: Mapping[tuple[str, str], float],
) -> dict[str, Any]:
    """What `Comparison.read` needs beside the runs: for each method its recipes, its rate, the keys of its runs."""
    task = bench.task
    keys: dict[tuple[str, str], list[str]] = {}
    for made in finals:
        keys.setdefault((made.row, made.method), []).append(made.key(bench.identity))
    return {
        "schema": records.SCHEMA,
        "kind": "comparison",
        "task": {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric,
            "train_rows": len(task.train),
            "test_rows": len(task.test),
        },
        "model": "/".join(Path(bench.model).parts[-2:]),
        "blocks": [site.name for site in bench.sites],
        "settings": asdict(bench.settings),
        "identity": bench.identity,
        **facts,
        "rows": [
            {
                "name": row.name,
                "methods": [
                    {
                        "name": method.name,
                        "recipes": [recipe.to_dict() for recipe in method.recipes],
                        "rate": rates[row.name, method.name],
                        "keys": keys[row.name, method.name],
                    }
                    for method in row.methods
                ],
            }
            for row in rows
        ],
    }


def _best_rate(record: Record, choosing: Sequence[Run], recipe: Recipe, task: Task, settings: Settings) -> float:
    """The rate with the best mean score on the held-out fifth of the training rows; of equals the smallest."""
    if not choosing:
        return settings.rates[0]
    scores: dict[float, list[float]] = {}
    for made in {r.key(record.identity): r for r in choosing if r.recipe == recipe}.values():
        score = record.find(made)["score"]
        worth = -math.inf if score is None else score if task.higher_is_better else -score
        scores.setdefault(made.rate, []).append(worth)
    return max(sorted(scores), key=lambda rate: sum(scores[rate]) / len(scores[rate]))


class Record:
    """The runs of one task that are done: a file of JSON lines that only grows. A torn last line is dropped.

    Raises:
        PlanError: another line is not JSON.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.lines = {line["key"]: line for line in read_lines(path)}

    def find(self, run: Run) -> dict[str, Any]:
        """The line of a run that is done."""
        return self.lines[run.key(self.identity)]

    def make(self, runs: Sequence[Run], train: Train, bar: Any) -> None:
        """Train those of `runs` that are not done yet, each once, and write each down as it ends."""
        wanted = {run.key(self.identity): run for run in runs}
        missing = [run for key, run in wanted.items() if key not in self.lines]
        if not bar.disable:
            bar.initial += len(wanted) - len(missing)  # the time left is judged by what is trained now
            bar.update(len(wanted) - len(missing))
        for made, result in train(missing):
            line = {
                "key": made.key(self.identity),
                **asdict(made),
                **result,
                "versions": versions(),
            }
            self._append(line)
            bar.update()

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[line["key"]] = line


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a runs.jsonl; none where there is no file. What follows the last line end is cut off the file."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise PlanError(
                f"Line {number} of {path} is not JSON: {error}. Remove the line; its run is made again."
            ) from error
    return lines


@contextlib.contextmanager
def _workers(bench: Bench, jobs: int) -> Iterator[Train]:
    """A function that trains runs, here or in `jobs` processes, and gives each with its result as it ends."""
    if jobs <= 1:
        yield lambda runs: ((made, _train(bench, made)) for made in runs)
        return
    bench.train, bench.test, bench.sites, bench.targets  # noqa: B018 - once here, not once in every process
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker, (threads,)) as pool:

        def train(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
            waiting = {pool.submit(functools.partial(_train, bench, made)): made for made in runs}
            for future in as_completed(waiting):
                yield waiting[future], future.result()

        try:
            yield train
        finally:
            pool.shutdown(cancel_futures=True)


def start_worker(threads: int) -> None:
    """Set up a process that trains: with so many threads, and no longer alive than the one that started it.

    A worker of Python's own pool waits for work for ever when its parent is killed.
    """
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(bench: Bench, made: Run) -> dict[str, Any]:
    return run(bench, made.recipe, made.seed, made.rate, choosing=made.choosing)


def _free_memory() -> int | None:
    """Bytes that a training could take: of the accelerator, else of the machine; None where that is not known."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])
