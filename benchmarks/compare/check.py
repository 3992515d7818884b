"""Does a comparison that was made anew say what the recorded one says? python -m benchmarks.compare.check FOLDER

Trainings follow the rounding of the processor: elsewhere scores are other draws from what the seeds vary anyway, and
the best of two rates that are nearly as good may be the other one. So no digits are compared. An error is: a
difference is told to be better in one and worse in the other; a score, or a difference, at rates that both have tried
is further from the recorded one than the spread of the seeds of both explains (Welch's t test, Holm's correction, 1 %
for all of either kind together); a method has other LoRA parameters.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from scipy import stats

from benchmarks.machine import RESULTS
from gelora_plugins.findings.arms import TOLERANCE
from gelora_plugins.findings.results import Result
from gelora_plugins.findings.stats import holm
from gelora_plugins.findings.summary import Comparison

LEVEL = 0.01
GRAIN = 0.005  # of a score: seeds that agree by chance do not make half a percent of it significant


def check(made: Comparison, recorded: Comparison) -> tuple[list[str], list[str]]:
    """(what was found, what is wrong), one sentence each, for the tasks and methods that both have."""
    old = {(r.task, r.row, r.method): r for r in recorded.results}
    new = {name: r for r in made.results if (name := (r.task, r.row, r.method)) in old}
    told = {(c.task, c.row, c.ours, c.theirs): c for c in recorded.contrasts}
    both = [(c, told[key]) for c in made.contrasts if (key := (c.task, c.row, c.ours, c.theirs)) in told]
    wrong = [str(gap) for gap in made.gaps] + ([] if new and both else ["The two have no method in common."])
    wrong += [
        f"{', '.join(name)}: {r.parameters:,.0f} LoRA parameters, recorded {old[name].parameters:,.0f}."
        for name, r in new.items()
        if abs(r.parameters - old[name].parameters) >= TOLERANCE * old[name].parameters
    ]
    opposite = {"better": "worse", "worse": "better"}
    wrong += [f"{c}\n  recorded: {other}" for c, other in both if opposite.get(c.verdict) == other.verdict]

    pairs = {name: pair for name in new if (pair := at_one_rate(new[name], old[name]))}
    wrong += _beyond_spread((", ".join(name), *pair) for name, pair in pairs.items())
    differences = []
    for c, _ in both:
        ours, theirs = pairs.get((c.task, c.row, c.ours)), pairs.get((c.task, c.row, c.theirs))
        if ours and theirs:
            samples = [[a - b for a, b in zip(*scores, strict=True)] for scores in zip(ours, theirs, strict=True)]
            differences.append((f"{c.task}, {c.row}: {c.ours} - {c.theirs}", *samples))
    wrong += _beyond_spread(differences)
    if wrong:
        return [], wrong
    signs = sum(c.difference.mean * other.difference.mean > 0 for c, other in both)
    return [
        f"{len(pairs)} of {len(new)} methods were judged at a recorded rate; none of their scores, and none of their "
        f"{len(differences)} differences, is further from the recorded one than the spread of the seeds explains.",
        f"{signs} of {len(both)} differences have the recorded sign; none is told to be the other way round.",
    ], []


def at_one_rate(made: Result, recorded: Result) -> tuple[Sequence[float], Sequence[float]] | None:
    """The scores of both at a rate that both were judged at, one of the two chosen ones if that can be."""
    if made.head_rate != recorded.head_rate:
        return None
    ours, theirs = (
        {r.rate: r.scores} | {a.rate: a.scores for a in r.around if not a.diverged} for r in (made, recorded)
    )
    common = [rate for rate in (recorded.rate, made.rate, *ours) if rate in ours and rate in theirs]
    return (ours[common[0]], theirs[common[0]]) if common else None


def _beyond_spread(samples: Iterable[tuple[str, Sequence[float], Sequence[float]]]) -> list[str]:
    """Those of (name, made, recorded) whose means differ by more than chance."""
    samples = [sample for sample in samples if min(map(len, sample[1:])) > 1]
    found = holm([_p(made, recorded) for _, made, recorded in samples])
    return [
        f"{name}: {statistics.fmean(made):.4g}, recorded {statistics.fmean(recorded):.4g} (corrected p {p:.1g})."
        for (name, made, recorded), p in zip(samples, found, strict=True)
        if p < LEVEL
    ]


def _p(made: Sequence[float], recorded: Sequence[float]) -> float:
    grain = GRAIN * max(map(abs, [*made, *recorded]))
    if grain == 0:
        return 1.0
    parts = [(statistics.fmean(x), max(statistics.stdev(x), grain), len(x)) for x in (made, recorded)]
    return float(stats.ttest_ind_from_stats(*parts[0], *parts[1], equal_var=False).pvalue)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a comparison that was made anew")
    parser.add_argument("--recorded", type=Path, default=RESULTS / "compare-small", help="the one that is recorded")
    options = parser.parse_args()
    if not options.recorded.exists():
        raise SystemExit(f"Nothing to check it against: {options.recorded} is not there.")
    found, wrong = check(Comparison.read(options.folder), Comparison.read(options.recorded))
    print("\n".join(found + wrong))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
