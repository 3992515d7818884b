"""Two methods of a comparison against each other, and what is said of their difference. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gelora_plugins.findings.results import Parts, Result
from gelora_plugins.findings.stats import (
    NO_VERDICT,
    NOT_TOLD,
    Difference,
    holm,
    paired_difference,
    verdict,
    worst,
)

CONTROLS = ("uniform", "permuted", "reversed", "rate_only", "eva", "adalora")


@dataclass(frozen=True)
class Contrast:
    """Two methods of one row on one task: `ours` against `theirs`, paired by seed.

    Attributes:
        difference: positive when `ours` is better, whatever the metric. Its interval and its p are the worst over the
            rates that could as well have been chosen for either.
        corrected_p: by Holm for the number of contrasts of the comparison, over all tasks and rows.
        verdict: "better", "worse", "not told apart", "equal within x", where x is within the margin, or "no verdict: "
            and why, as where seeds of one of them diverged.
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
        if d.interval is None or d.smallest is None or self.verdict.startswith(NO_VERDICT):
            return f"{self.task}, {self.row}: {self.ours} against {self.theirs}: {self.verdict}."
        said = f"{self.task}, {self.row}: {self.ours} is {_as_words(self.verdict, self.theirs)}"
        if d.interval == (0.0, 0.0):
            return f"{said}: the scores are the same."
        rows = f" and {d.rows:,} test rows" if d.rows else ""
        return (
            f"{said} (difference {d.mean:+.3g}, 95 % {d.interval[0]:+.3g} to {d.interval[1]:+.3g}, corrected p "
            f"{self.corrected_p:.2g}; the smallest difference that {d.seeds} seeds{rows} could have shown "
            f"without the correction: {d.smallest:.2g})."
        )


def _as_words(verdict: str, theirs: str) -> str:
    if verdict.startswith("equal"):
        return verdict.replace("equal", f"equal to {theirs}")
    if verdict == NOT_TOLD:
        return f"{verdict} from {theirs}"
    return f"{verdict} than {theirs}"


def contrasts_of(results: Sequence[Result], margins: Mapping[str, float]) -> Iterator[Contrast]:
    """The plan against each control, each other arm against uniform, and a method on a plan against the plan.

    The p values are corrected over all of them. In the order of rows and pairs, then of tasks.
    """
    found: dict[tuple[str, str, str], list[tuple[str, Difference]]] = {}
    at = {(result.task, result.row, result.method): result for result in results}
    for task, row in dict.fromkeys((result.task, result.row) for result in results):
        pairs = [(row, control) for control in CONTROLS]
        arms = [arm for of_task, of_row, arm in at if (of_task, of_row) == (task, row)]
        pairs += [(arm, "uniform") for arm in arms if arm not in (row, "uniform")]
        pairs += [(arm, row) for arm in arms if arm.endswith(f" on {row}")]
        for ours, theirs in pairs:
            if (task, row, ours) in at and (task, row, theirs) in at:
                found.setdefault((row, ours, theirs), []).append(
                    (task, _difference(at[task, row, ours], at[task, row, theirs]))
                )
    family = [(task, *names, difference) for names, by_task in found.items() for task, difference in by_task]
    corrected = holm([difference.p for *_, difference in family])
    for (task, row, ours, theirs, difference), p in zip(family, corrected, strict=True):
        said = verdict(difference, p, margins[task])
        for name in (ours, theirs):
            if at[task, row, name].diverged:
                said = f"{NO_VERDICT}{name}: {at[task, row, name].diverged}"
        yield Contrast(task, row, ours, theirs, difference, p, said)


def _difference(ours: Result, theirs: Result) -> Difference:
    """At their rates; as sure as it is at each pair of rates that could as well have been chosen."""
    sign = 1.0 if ours.higher_is_better else -1.0
    pairs = []
    for first, of_first in _could_be(ours):
        for second, of_second in _could_be(theirs):
            left, right = ([sign * score for score in scores] for scores in (first, second))
            rows = [[[sign * part for part in of_seed] for of_seed in parts] for parts in (of_first, of_second)]
            pairs.append(paired_difference(left, right, (rows[0], rows[1]) if all(rows) else None))
    return worst(pairs)


def _could_be(result: Result) -> list[tuple[Sequence[float], Parts]]:
    """Its scores and their parts, and those at the rates that could as well have been chosen."""
    others = [around for around in result.around if around.as_good and not around.diverged]
    return [
        (result.scores, result.parts),
        *(([score for score in around.scores if score is not None], around.parts) for around in others),
    ]
