"""Which r? Loss and score against the total rank, and what each rule for it costs, as PREREGISTRATION.md says:

    python -m benchmarks.compare.which_r docstrings [--jobs 2]
    python -m benchmarks.compare.which_r ag_news subj --data DIR [--jobs 2]

Every arm, a uniform rank or a plan of the published policy, has its rate chosen by held-out training loss, and is then
judged on test rows with other seeds. Runs go to benchmarks/results/which-r/TASK/runs.jsonl, what they come to beside
them. A stopped script goes on.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.compare.tasks import MINILM, docstrings, from_files, minilm
from benchmarks.compare.which_r_shown import HALF, TWICE, check, draw, lines_of
from benchmarks.machine import RESULTS, machine
from gelora_plugins import GeLoRAConfig, json_files
from gelora_plugins.compare.allocations import lora, random_allocations
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.run import Trainers, measured
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.findings.arms import Recipe
from gelora_plugins.findings.headroom import Allocation, Headroom
from gelora_plugins.findings.record import Record, Run, diverged, locked
from gelora_plugins.findings.stats import Difference, mean_interval, paired_difference
from gelora_plugins.ranks.planning import make_plan
from gelora_plugins.ranks.totals import total_rank

GRID = (1, 2, 4, 8, 16, 32, 64)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
FIRST = 2  # the place in RATES at which the search of r = 8 begins
CHOOSING, JUDGING = 2, 5  # seeds; those that choose are not among those that judge
HEAD_RATE = 0.01
SETTINGS = replace(MINILM, target_modules="all-linear", bf16=False)
FOLDER = RESULTS / "which-r"
RULES: tuple[int | str, ...] = (8, 16, 32, "rows", "tokens", "dimension_mean", "dimension_max", "dimension_last")
RANDOM = 12  # allocations with the parameters of r = 8
PILOT = (2, 8, 32)  # the rule "pilot" takes the one with the lowest held-out loss

Lines = Sequence[Mapping[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=["docstrings", "ag_news", "subj"])
    parser.add_argument("--data", type=Path, help="folder of the tasks that are read from files")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="+", default=(), metavar="ARM", help='arms beside "r = 8"; all if not given')
    parser.add_argument(
        "--random", type=int, default=RANDOM, help="allocations that the headroom is measured with; 0: none"
    )
    parser.add_argument("--check", action="store_true", help="against what is recorded: sign, order and size")
    parser.add_argument(
        "--recorded-rates",
        action="store_true",
        help="take the rates of the record: no search, and no others beside them",
    )
    options = parser.parse_args()
    for name in options.tasks:
        if name != "docstrings" and options.data is None:
            raise SystemExit(f"{name} needs --data DIR with DIR/{name}/train.jsonl.gz and validation.jsonl.gz")
        task = docstrings() if name == "docstrings" else from_files(name, options.data)
        bench = Bench(minilm(), task, replace(SETTINGS, epochs=3 if name == "docstrings" else 1), options.output / name)
        recorded = (
            json_files.read_json(FOLDER / name / "which_r.json") if options.check or options.recorded_rates else {}
        )
        rates = {arm["arm"]: arm["rate"] for arm in recorded["arms"]} if options.recorded_rates else None
        for found in judge(bench, options.jobs, options.only, options.random, rates):
            json_files.write_json(options.output / name / "which_r.json", found)
        print(*lines_of(found), sep="\n", flush=True)
        draw(options.output)
        if options.check:
            said, wrong = check(found, recorded)
            print(*said, *wrong, sep="\n")
            if wrong:
                raise SystemExit(1)


def judge(
    bench: Bench, jobs: int, only: Sequence[str], random: int, rates: Mapping[str, float] | None = None
) -> Iterator[dict[str, Any]]:
    """Train every arm of a task at its own rate; after each, all so far beside rank 8 and the best of the grid.

    The rates are searched for, unless `rates` has that of every arm.
    """
    profile = measured(bench, GeLoRAConfig())
    # What is learnt of a row is its label; the profile is measured on rows without.
    profile = replace(profile, num_rows=len(bench.train), num_targets=len(bench.train))
    every = _arms(bench, profile)
    arms = {name: recipe for name, recipe in every.items() if name in ("r = 8", *(only or [name]))}
    *_, last = arms
    recipes = arms | dict.fromkeys((HALF, TWICE), arms["r = 8"])
    chosen = {str(rule): total_rank(rule, profile, bench.sites, 8) for rule in RULES}
    on_grid = {rule: min(GRID, key=lambda r: abs(math.log2(r / rank))) for rule, rank in chosen.items()}
    made: dict[str, tuple[float, list[dict[str, Any]]]] = {}
    held_out: dict[str, dict[float, float]] = {}
    headroom: dict[str, Any] = {}
    with locked(bench.folder), tqdm(unit="run") as bar:
        record = Record(bench.folder / "runs.jsonl", bench.identity)
        first = FIRST
        for arm, recipe in arms.items():
            if rates is None:
                place, held_out[arm] = _chosen(record, bench, arm, recipe, first, jobs, bar)
                first = place if arm == "r = 8" else first
            else:
                place = RATES.index(rates[arm])
            made[arm] = _judged(record, bench, arm, recipe, place, jobs, bar)
            if arm == "r = 8" and rates is None:
                made |= _at_other_rates(record, bench, recipe, made[arm][0], jobs, bar)
            if arm == last and random:
                headroom = _headroom(record, bench, *made["r = 8"], random, jobs, bar)
            losses = {name: statistics.fmean(line["loss"] for line in lines) for name, (_, lines) in made.items()}
            best = min((name for name in losses if name.startswith("r = ")), key=lambda name: losses[name])
            rules = [{"rule": rule, "rank": chosen[rule], "judged_as": f"r = {on_grid[rule]}"} for rule in chosen]
            yield {
                "machine": machine(),
                "task": bench.task.name,
                "train_rows": len(bench.train),
                "test_rows": len(bench.test),
                "parameters_per_rank": sum(site.parameters_per_rank for site in bench.sites),
                "best": best,
                "arms": [_row(name, recipes[name], *made[name], made["r = 8"][1], made[best][1]) for name in made],
                "not_run": [name for name in every if name not in made],
                "rules": [*rules, *_pilot(held_out)],
                "headroom": headroom,
            }


def _pilot(held_out: Mapping[str, Mapping[float, float]]) -> list[dict[str, Any]]:
    """The rule "pilot", where all that it looks at has been trained."""
    losses = {rank: min(held_out[f"r = {rank}"].values()) for rank in PILOT if f"r = {rank}" in held_out}
    if len(losses) < len(PILOT):
        return []
    rank = min(losses, key=lambda rank: losses[rank])
    return [{"rule": "pilot", "rank": rank, "judged_as": f"r = {rank}"}]


def _arms(bench: Bench, profile: DimensionProfile) -> dict[str, Recipe]:
    """All arms, 8 first, as all others begin at its rate."""
    half = len(bench.sites) // 2  # of six blocks of one size
    ranks: dict[str, Sequence[int]] = {f"r = {rank}": [rank] * len(bench.sites) for rank in (8, 1, 2, 4, 32)}
    for floor in (1, 2):
        config = GeLoRAConfig(min_rank=floor)
        ranks[f"published, floor {floor}"] = make_plan(profile, config, bench.sites, 8, lora_alpha=16).ranks
    ranks["budget"] = make_plan(profile, GeLoRAConfig(policy="budget"), bench.sites, 8, lora_alpha=16).ranks
    ranks["early"] = [15] * half + [1] * half
    ranks |= {f"r = {rank}": [rank] * len(bench.sites) for rank in GRID}
    ranks["late"] = ranks["early"][::-1]
    return {name: lora(of_blocks, bench.sites, keep_alpha=True) for name, of_blocks in ranks.items()}


def _chosen(
    record: Record, bench: Bench, name: str, recipe: Recipe, first: int, jobs: int, bar: Any
) -> tuple[int, dict[float, float]]:
    """(the place in RATES of the lowest held-out loss, the losses by rate), from `first` on, both neighbours known.

    One at which a seed diverges is worse than all others.
    """
    losses: dict[int, float] = {}
    best = first
    while missing := {max(best - 1, 0), best, min(best + 1, len(RATES) - 1)} - set(losses):
        runs = {
            place: [
                Run(name, "uniform", recipe, JUDGING + seed, RATES[place], True, HEAD_RATE) for seed in range(CHOOSING)
            ]
            for place in missing
        }
        record.make([made for some in runs.values() for made in some], Trainers(bench, jobs), bar)
        for place, some in runs.items():
            lines = [record.lines[made.key(bench.identity)] for made in some]
            gone = any(map(diverged, lines))
            losses[place] = math.inf if gone else statistics.fmean(line["loss"] for line in lines)
        best = min(losses, key=lambda place: losses[place])
    return best, {RATES[place]: loss for place, loss in losses.items()}


def _judged(
    record: Record, bench: Bench, name: str, recipe: Recipe, place: int, jobs: int, bar: Any
) -> tuple[float, list[dict[str, Any]]]:
    """(the rate, the lines of the runs that judge it): the chosen one, or the next lower at which no seed diverges."""
    for rate in RATES[place::-1]:
        judges = [Run(name, "uniform", recipe, seed, rate, False, HEAD_RATE) for seed in range(JUDGING)]
        record.make(judges, Trainers(bench, jobs), bar)
        found = [record.lines[made.key(bench.identity)] for made in judges]
        if not any(map(diverged, found)):
            return rate, found
        print(f"{name}: {sum(map(diverged, found))} of {JUDGING} seeds diverged at the rate {rate:g}.")
    raise SystemExit(f"{name}: seeds diverge at every rate.")


def _at_other_rates(
    record: Record, bench: Bench, recipe: Recipe, rate: float, jobs: int, bar: Any
) -> dict[str, tuple[float, list[dict[str, Any]]]]:
    """What a factor of two in the rate costs, as `_judged`; without one at which seeds diverge."""
    found = {}
    for name, other in ((HALF, rate / 2), (TWICE, 2 * rate)):
        judges = [Run(name, "uniform", recipe, seed, other, False, HEAD_RATE) for seed in range(JUDGING)]
        record.make(judges, Trainers(bench, jobs), bar)
        lines = [record.lines[made.key(bench.identity)] for made in judges]
        if any(map(diverged, lines)):
            print(f"{name}: {sum(map(diverged, lines))} of {JUDGING} seeds diverged at {other:g}.")
        else:
            found[name] = (other, lines)
    return found


def _headroom(
    record: Record, bench: Bench, rate: float, eight: Lines, count: int, jobs: int, bar: Any
) -> dict[str, dict[str, Any]]:
    """What could be won by moving ranks at the parameters of r = 8: by the loss, and by the score in hundredths."""
    uniform = [8] * len(bench.sites)
    drawn = random_allocations(uniform, bench.sites, count, base_rank=8)
    recipes = [lora(ranks, bench.sites, keep_alpha=True) for ranks in drawn]
    runs = [
        [Run(f"random {i}", "uniform", recipe, seed, rate, False, HEAD_RATE) for seed in range(JUDGING)]
        for i, recipe in enumerate(recipes, 1)
    ]
    record.make([made for some in runs for made in some], Trainers(bench, jobs), bar)
    lines = [[record.lines[made.key(bench.identity)] for made in some] for some in runs]
    found = {}
    for what, unit in (("loss", 1), ("score", 100)):
        named = [("uniform", uniform, eight)] + [(s[0].row, r, f) for s, r, f in zip(runs, drawn, lines, strict=True)]
        arms = [
            Allocation(name, tuple(ranks), tuple(None if diverged(line) else unit * line[what] for line in of_arm))
            for name, ranks, of_arm in named
        ]
        metric = what if what == "loss" else bench.task.metric
        cost = recipes[0].parameters
        room = Headroom(bench.task.name, "r = 8", metric, cost, rate, 0.0, arms[0], tuple(arms[1:]), {})
        found[what] = {"said": str(room), "verdict": room.verdict, "layout": room.layout and asdict(room.layout)}
    return found


def _row(name: str, recipe: Recipe, rate: float, lines: Lines, eight: Lines, best: Lines) -> dict[str, Any]:
    losses, scores = ([line[what] for line in lines] for what in ("loss", "score"))
    return {
        "arm": name,
        "parameters": recipe.parameters,
        "ranks": list(recipe.ranks),
        "rate": rate,
        "edge": rate in (RATES[0], RATES[-1]),
        "loss": mean_interval(losses),
        "score": [100 * x if x is not None else None for x in mean_interval(scores)],
        "loss_less_that_of_8": _shown(paired_difference(losses, [line["loss"] for line in eight])),
        "loss_less_the_best": _shown(paired_difference(losses, [line["loss"] for line in best])),
        "score_less_that_of_8": _shown(_of_rows(lines, eight)),
    }


def _of_rows(ours: Lines, theirs: Lines) -> Difference:
    """The difference of two scores in points, with the luck of seeds and of test rows."""
    scores = ([100 * line["score"] for line in ours], [100 * line["score"] for line in theirs])
    parts = ([[100 * x for x in line["parts"]] for line in ours], [[100 * x for x in line["parts"]] for line in theirs])
    return paired_difference(*scores, parts)


def _shown(difference: Difference) -> list[float | None]:
    return [difference.mean, *(difference.interval or (None, None))]


if __name__ == "__main__":
    main()
