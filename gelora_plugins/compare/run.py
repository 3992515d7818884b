"""`gelora compare`: methods at equal LoRA parameters, trained and scored alike. Goes on where it was stopped."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gelora_plugins import json_files
from gelora_plugins.compare.allocations import (
    OF_A_PLAN,
    grid_groups,
    headroom_group,
    lora,
    plan_group,
    rank_group,
    spread,
)
from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.task import Task, check_name
from gelora_plugins.compare.train import attempt, chooses_ranks, first_parameters, measure_eva
from gelora_plugins.compare.tuning import (
    Search,
    Trial,
    at_rates_of_uniform,
    head_search,
    judge,
    search_all,
    search_to_dict,
)
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.errors import PlanError
from gelora_plugins.findings.arms import HEADROOM, TOLERANCE, Arm, Group, Recipe
from gelora_plugins.findings.record import Record, Run, digest, locked, made_of
from gelora_plugins.findings.summary import Comparison
from gelora_plugins.pipeline import measure
from gelora_plugins.probe.progress import progress_bar
from gelora_plugins.ranks.guard import late_note
from gelora_plugins.ranks.plan import RankPlan
from gelora_plugins.ranks.planning import make_plan
from gelora_plugins.side_by_side import side_by_side

logger = logging.getLogger(__name__)
BYTES_PER_TRAINED = 16  # float32 weight, gradient, and AdamW's two moments


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
        plans: to compare, each in a group of its own with its controls. Default: `default_plans`; none are made where
            no allocation of the settings follows a plan.
        keep_alpha: names of plans that are trained with one lora_alpha instead of one scaling.
        jobs: processes that train at the same time, each with its share of the cores.

    Returns:
        The comparison of all tasks in `output`. What failed, diverged or is not finished is in its `gaps`.

    Raises:
        PlanError: arms of a group are not at equal parameters, runs.jsonl is damaged, or the folder of the task holds
            a comparison of another model or of other rows.
        WriteError: another process is at work in the folder of the task, or it cannot be written to.
        GeLoRAError: the task, the model or an option cannot be used.
    """
    settings = settings or Settings()
    bench = Bench(model, task, settings, Path(output) / task.name)
    with locked(bench.folder):
        _check_same_task(bench)
        if not set(OF_A_PLAN) & set(bench.settings.allocations):
            plans = {}
        elif plans is None:
            plans = default_plans(bench, config or GeLoRAConfig(), progress=progress)
        groups, facts = design(bench, plans, frozenset(keep_alpha))
        _train(bench, groups, facts, Trainers(bench, jobs), progress)
    return Comparison.read(output)


def _check_same_task(bench: Bench) -> None:
    """The report of another comparison would be lost; its runs cannot serve this one."""
    path = bench.folder / "experiment.json"
    if not path.is_file():
        return
    there, here = json_files.read_json(path), bench.identity
    recorded = there.get("identity", {})
    same_model = there.get("model") == _short(bench.model) or recorded.get("model") == here["model"]
    if not same_model or recorded.get("task") != here["task"]:
        what = "other rows, another metric or another max_length" if same_model else f"another model, {there['model']}"
        raise PlanError(
            f"{bench.folder} holds a comparison with {what}. Give this task another name, or the comparison another "
            "output."
        )


def _short(model: str) -> str:
    return "/".join(Path(model).parts[-2:])


def _train(bench: Bench, groups: Sequence[Group], facts: Mapping[str, Any], workers: Trainers, progress: bool) -> None:
    """Make the runs that choose the rates, then those for the result; write down what is compared."""
    task, settings = bench.task, bench.settings
    record = Record(bench.folder / "runs.jsonl", bench.identity)
    if record.lines and not any(made_of(line).key(bench.identity) == key for key, line in record.lines.items()):
        logger.warning(
            "The %d runs that are recorded in %s were made with other settings, versions or another device: none of "
            "them is taken.",
            len(record.lines),
            record.path,
        )
    path = bench.folder / "experiment.json"
    with progress_bar(total=0, desc=task.name, unit="run", shown=progress) as bar:
        head_rate, head = _head(bench, record, workers, bar)
        facts = {**facts, "head": head}
        trials = _trials(groups, settings, head_rate, record, workers, bar)
        drawn = at_rates_of_uniform(groups, trials)
        json_files.write_json(path, _experiment(bench, groups, facts, [*trials, *drawn], record))
        judge(trials, settings.seeds, record, workers, bar)
        drawn = at_rates_of_uniform(groups, trials)  # which is another one now where seeds diverged
        json_files.write_json(path, _experiment(bench, groups, facts, [*trials, *drawn], record))
        judge(drawn, settings.seeds, record, workers, bar)
        json_files.write_json(path, _experiment(bench, groups, facts, [*trials, *drawn], record))


def _head(bench: Bench, record: Record, workers: Trainers, bar: Any) -> tuple[float | None, dict[str, Any] | None]:
    """(the rate of what is trained beside the adapter, how it was chosen); None where it is the adapter's."""
    settings = bench.settings
    if settings.head_rate is not None:
        return settings.head_rate or None, None
    if bench.task.kind == "causal-lm" or len(settings.rates) == 1:
        return None, None
    recipe = lora([settings.rank] * len(bench.sites), bench.sites)
    search = head_search(settings, recipe, record, workers, bar)
    choice = None if search is None else search.choice(record)
    if search is None or choice is None:
        return None, None
    return choice.rate, {"beside": search.made.rate, **search_to_dict(search, choice, record)}


def _trials(
    groups: Sequence[Group], settings: Settings, head_rate: float | None, record: Record, workers: Trainers, bar: Any
) -> list[Trial]:
    """Every arm with its rate, but for those of random allocations."""
    pairs = [(group.name, arm) for group in groups if not group.name.startswith(HEADROOM) for arm in group.arms]
    if len(settings.rates) == 1:
        return [Trial(group, arm, head_rate, None, None, settings.rates[0]) for group, arm in pairs]
    first = [Run(group, arm.name, arm.recipes[0], 0, 0.0, choosing=True, head_rate=head_rate) for group, arm in pairs]
    searches = [Search(made, settings.rates, settings.rate_seeds) for made in first]
    search_all(searches, record, workers, bar)
    trials = []
    for (group, arm), search in zip(pairs, searches, strict=True):
        choice = search.choice(record)
        trials.append(Trial(group, arm, head_rate, search, choice, None if choice is None else choice.rate))
    return trials


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
        return DimensionProfile.from_dict(json_files.read_json(path))
    rows = [{name: row[name] for name in row if name != "labels"} for row in bench.train]
    profile = measure(bench.load(0), rows, config, layout=bench.layout, progress=progress)
    json_files.write_json(path, profile.to_dict())
    return profile


def design(
    bench: Bench, plans: Mapping[str, RankPlan], keep_alpha: frozenset[str] = frozenset()
) -> tuple[tuple[Group, ...], dict[str, Any]]:
    """The groups of a comparison, and facts for its report: seconds of each preparation, EVA's ranks, what is left out.

    Raises:
        ConfigError: a plan has a name that cannot be told from an arm's, or cannot be shown.
        PlanError: arms of a group are not at equal parameters.
    """
    for name in plans:
        check_name(name, "plan")
    settings, notes = bench.settings, bench.notes
    groups: list[Group] = []
    seconds: dict[str, float] = {}
    eva: dict[str, Any] = {}
    methods = [m for m in settings.methods if m not in ("eva", "full") and not chooses_ranks(m)]
    totals = {name: plan.num_parameters for name, plan in plans.items()}
    if not plans and "uniform" in settings.allocations:
        totals[f"r = {settings.rank}"] = lora([settings.rank] * len(bench.sites), bench.sites).parameters
    for name, total in totals.items():
        adaptive = _adaptive(bench, name, total, seconds, eva, notes)
        if name not in plans:
            groups.append(rank_group(settings.rank, bench.sites, methods, adaptive))
            continue
        plan = plans[name]
        plan.check_sites(bench.sites)
        notes += [f"{name}: {note}" for note in (late_note(plan),) if note]
        seconds[name] = plan.profile.seconds
        keep = name in keep_alpha
        groups.append(plan_group(name, plan, settings.allocations, methods, settings.seeds, adaptive, keep_alpha=keep))
    for group in groups:
        notes += [*group.notes, *_larger_at_first(bench, group)]
    for name, total in totals.items() if settings.headroom else ():
        drawn, few = headroom_group(name, total, settings.headroom, bench.sites, settings.rank)
        groups += [] if drawn is None else [drawn]
        notes += few
    if "grid" in settings.allocations and "lora" in methods:
        groups += grid_groups(settings.grid, bench.sites)
    if "full" in settings.methods:
        free = _free_memory()
        if free is None or BYTES_PER_TRAINED * bench.num_parameters < free:
            groups.append(Group("full", (Arm("full", (Recipe("full", bench.num_parameters),)),)))
        else:
            notes.append(f"Full fine-tuning is left out: its {bench.num_parameters:,} parameters do not fit in memory.")
    return tuple(groups), {"notes": notes, "seconds": seconds, "eva_ranks": eva}


def _adaptive(
    bench: Bench, name: str, total: int, seconds: dict[str, float], eva: dict[str, Any], notes: list[str]
) -> dict[str, Recipe]:
    """The methods that choose ranks themselves, at `total` parameters; why one is left out goes to `notes`."""
    found, methods = {}, bench.settings.methods
    if "eva" in methods:
        try:
            found["eva"], eva[name], seconds[f"{name}/eva"] = measure_eva(bench, total)
        except PlanError as error:
            notes.append(f"{name}: EVA is left out. {error}")
    for method in methods:
        if chooses_ranks(method):
            found[method] = replace(lora(spread(total, bench.sites), bench.sites), kind=method)
    return found


def _larger_at_first(bench: Bench, group: Group) -> Iterator[str]:
    """Which arms train more parameters than they end with."""
    for arm in group.arms:
        first = first_parameters(bench, arm.recipes[0])
        if first > (1 + TOLERANCE) * arm.recipes[0].parameters:
            share = first / arm.recipes[0].parameters
            yield f"{group.name}: {arm.name} trains {share:.2g} times these parameters at first, and ends with as many."


def _experiment(
    bench: Bench, groups: Sequence[Group], facts: Mapping[str, Any], trials: Sequence[Trial], record: Record
) -> dict[str, Any]:
    """What `Comparison.read` needs beside the runs."""
    task, seeds = bench.task, bench.settings.seeds
    methods = {g.name: [trial.to_dict(record, seeds) for trial in trials if trial.group == g.name] for g in groups}
    return {
        "schema": json_files.SCHEMA,
        "kind": "comparison",
        "task": {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric,
            "train_rows": len(task.train),
            "test_rows": len(task.test),
        },
        "model": _short(bench.model),
        "blocks": [site.name for site in bench.sites],
        "settings": asdict(bench.settings),
        "identity": bench.identity,
        **facts,
        "rows": [{"name": name, "methods": found} for name, found in methods.items()],
    }


class Trainers:
    """Trains here, or in `jobs` processes, each with its share of the cores."""

    def __init__(self, bench: Bench, jobs: int) -> None:
        self.bench = bench
        self.jobs = max(jobs, 1)

    def train(self, runs: Iterable[Run], jobs: int) -> Iterator[tuple[Run, dict[str, Any] | str]]:
        """Each run with its result as it ends, or with the reason why it failed."""
        if self.jobs == 1:
            return ((made, attempt(self.bench, made)) for made in runs)
        self.bench.train, self.bench.test, self.bench.sites, self.bench.targets  # noqa: B018 - once here, not in each
        threads = max(1, torch.get_num_threads() // jobs)
        work = functools.partial(attempt, self.bench, threads=threads)
        return side_by_side(work, runs, jobs, preload=[attempt.__module__])


def _free_memory() -> int | None:
    """Bytes that a training could take: of the accelerator, else of the machine; None where that is not known."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])
