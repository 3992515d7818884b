"""The rates of a comparison: the head's, once for the task, and each method's, all by the search of `rates.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gelora_plugins.compare.bench import Settings
from gelora_plugins.compare.rates import Choice, Found, choose, cliff_runs, next_runs
from gelora_plugins.findings.arms import HEADROOM, Arm, Group, Recipe
from gelora_plugins.findings.record import Record, Run, Workers, diverged, excess

FIRST_SEED = 1000  # of those that choose rates; those that judge begin at 0
ROUGH = 2  # seeds of the search for a rate to search for the head's beside
FALLS = 3  # lower rates that are tried where judging seeds diverge


@dataclass(frozen=True)
class Search:
    """The search for one rate: the adapter's, or the head's at a rate of the adapter.

    Attributes:
        made: a run of the search; its seed, and the rate that is searched for, are not looked at.
        grid: the rates to begin with.
        seeds: how many.
        of_head: whether it is the head's rate that is searched for.
        to_cliff: whether it goes up to where runs diverge.
    """

    made: Run
    grid: tuple[float, ...]
    seeds: int
    of_head: bool = False
    to_cliff: bool = True

    def runs(self, record: Record) -> list[Run]:
        """What to train next; nothing where the search has ended, or its recipe failed."""
        if self.made.recipe in record.failures:
            return []
        return [self._run(rate, seed) for rate, seed in self._next(self._found(record))]

    def done(self, record: Record) -> dict[float, list[str]]:
        """The keys of its runs that are recorded, by rate."""
        found = self._found(record)
        return {rate: [self._run(rate, seed).key(record.identity) for seed in found[rate]] for rate in sorted(found)}

    def choice(self, record: Record) -> Choice | None:
        """What it came to; None where a run failed."""
        return None if self.made.recipe in record.failures else choose(self._found(record), self._seeds)

    @property
    def _seeds(self) -> list[int]:
        return list(range(FIRST_SEED, FIRST_SEED + self.seeds))

    def _next(self, found: Found) -> list[tuple[float, int]]:
        runs = next_runs(found, self.grid, self._seeds)
        return runs if runs or not self.to_cliff else cliff_runs(found, self.grid, self._seeds)

    def _run(self, rate: float, seed: int) -> Run:
        made = replace(self.made, seed=seed)
        return replace(made, head_rate=rate) if self.of_head else replace(made, rate=rate)

    def _found(self, record: Record) -> dict[float, dict[int, float]]:
        """What is recorded, grown from the grid as the search itself would: what others tried is not taken."""
        found: dict[float, dict[int, float]] = {}
        while True:
            asked = self._next(found)
            there = [(r, s, record.lines.get(self._run(r, s).key(record.identity))) for r, s in asked]
            if not asked or any(line is None for *_, line in there):
                return found
            for rate, seed, line in there:
                assert line is not None
                found.setdefault(rate, {})[seed] = excess(line)


def search_all(searches: Sequence[Search], record: Record, workers: Workers, bar: Any) -> None:
    """Make the runs of all searches, round by round: those of one round side by side."""
    while runs := [made for search in searches for made in search.runs(record)]:
        make(record, runs, workers, bar)


def make(record: Record, runs: Sequence[Run], workers: Workers, bar: Any) -> None:
    """`record.make` with a bar that is as long as what is known to be wanted."""
    if not bar.disable:
        bar.total = (bar.total or 0) + len({made.key(record.identity) for made in runs})
    record.make(runs, workers, bar)


def head_search(settings: Settings, recipe: Recipe, record: Record, workers: Workers, bar: Any) -> Search | None:
    """The search for the head's rate on `recipe`, made; None where the adapter has no rate to search beside.

    It is made at the adapter's best rate with the head at the same one, which two seeds are enough for. The adapter's
    own rate is searched for after it.
    """
    made = Run("head", "uniform", recipe, 0, 0.0, choosing=True)
    beside = Search(made, settings.rates, min(ROUGH, settings.rate_seeds), to_cliff=False)
    search_all([beside], record, workers, bar)
    choice = beside.choice(record)
    if choice is None or choice.rate is None:
        return None
    search = Search(replace(made, rate=choice.rate), settings.rates, settings.rate_seeds, of_head=True, to_cliff=False)
    search_all([search], record, workers, bar)
    return search


@dataclass
class Trial:
    """One arm of a group: its search, and the rates at which the seeds that judge have run.

    Attributes:
        search: None where the rate is not chosen but taken.
        rate: that of the result: the chosen one, or a lower one where seeds diverged there.
        judged: all rates at which the seeds that judge run: that one, its neighbours, and lower ones that were tried.
    """

    group: str
    arm: Arm
    head_rate: float | None
    search: Search | None
    choice: Choice | None
    rate: float | None
    judged: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.judged = [] if self.rate is None else [self.rate, *(self.choice.near if self.choice else ())]

    def finals(self, rate: float, seeds: int) -> list[Run]:
        """The runs that judge at `rate`."""
        name = self.arm.name
        return [
            Run(self.group, name, self.arm.recipe(seed), seed, rate, choosing=False, head_rate=self.head_rate)
            for seed in range(seeds)
        ]

    def lower(self, record: Record, seeds: int) -> float | None:
        """The next lower rate that the search tried, where seeds diverged at this one."""
        if self.search is None or self.rate is None:
            return None
        lines = (record.lines.get(made.key(record.identity)) for made in self.finals(self.rate, seeds))
        if not any(line is not None and diverged(line) for line in lines):
            return None
        return max((rate for rate in self.search.done(record) if rate < self.rate), default=None)

    def to_dict(self, record: Record, seeds: int) -> dict[str, Any]:
        """JSON-able values, for experiment.json: its recipes, its rates, the keys of its runs, and what failed."""

        def keys(rate: float) -> list[str]:
            return [made.key(record.identity) for made in self.finals(rate, seeds)]

        recipes, failures = self.arm.recipes, record.failures
        found = {
            "name": self.arm.name,
            "recipes": [recipe.to_dict() for recipe in recipes],
            "rate": self.rate,
            "keys": [] if self.rate is None else keys(self.rate),
            "others": [{"rate": rate, "keys": keys(rate)} for rate in self.judged if rate != self.rate],
            "failure": next((failures[recipe] for recipe in recipes if recipe in failures), None),
        }
        if self.search is None or self.choice is None:
            return found
        return found | {"search": search_to_dict(self.search, self.choice, record)}


def search_to_dict(search: Search, choice: Choice, record: Record) -> dict[str, Any]:
    """JSON-able values: what a search came to, and its runs by rate."""
    runs = [{"rate": rate, "keys": keys} for rate, keys in search.done(record).items()]
    return {"chosen": choice.rate, **{k: v for k, v in asdict(choice).items() if k != "rate"}, "runs": runs}


def at_rates_of_uniform(groups: Sequence[Group], trials: Sequence[Trial]) -> list[Trial]:
    """The random allocations, each at the rates at which uniform ranks of the same cost are judged.

    A search for each of them would cost twenty trainings or so, and its luck would pass for that of the allocation.
    """
    uniform = {trial.group: trial for trial in trials if trial.arm.name == "uniform"}
    pairs = [(group, arm) for group in groups if group.name.startswith(HEADROOM) for arm in group.arms]
    beside = [uniform[group.name.removeprefix(HEADROOM)] for group, _ in pairs]
    return [
        Trial(group.name, arm, trial.head_rate, None, None, trial.rate)
        for (group, arm), trial in zip(pairs, beside, strict=True)
    ]


def judge(trials: Sequence[Trial], seeds: int, record: Record, workers: Workers, bar: Any) -> None:
    """Make the runs that judge: at the chosen rates, at their neighbours, and lower where seeds diverged.

    Seed by seed, so that a comparison that is stopped has as many seeds of one method as of another.
    """
    chosen = [trial for trial in trials if trial.rate is not None]
    for places in (slice(1), slice(1, None)):
        made = [t.finals(rate, seeds) for t in chosen for rate in t.judged[places]]
        make(record, [run for of_seed in zip(*made, strict=True) for run in of_seed], workers, bar)
    for _ in range(FALLS):
        lowered = [(trial, rate) for trial in chosen if (rate := trial.lower(record, seeds)) is not None]
        for trial, rate in lowered:
            trial.rate = rate
            trial.judged += [] if rate in trial.judged else [rate]
        make(record, [run for trial, rate in lowered for run in trial.finals(rate, seeds)], workers, bar)
