"""Does a comparison that was made anew say what the recorded one says? python benchmarks/compare_check.py FOLDER

Scores are the same to the last digit on the recorded machine and versions; elsewhere they move a little, and the sign
of a difference that nobody can tell from 0 may flip. So only this is an error: a difference that one of the two calls
better or worse has another sign in the other, or a method has other LoRA parameters. The rest is printed.
"""

import argparse
from itertools import combinations
from pathlib import Path

from machine import RESULTS

from gelora_plugins.compare_report import Comparison


def check(made: Comparison, recorded: Comparison) -> tuple[list[str], list[str]]:
    """(what was found, what is wrong), one sentence each, for the tasks and methods that both have."""
    scores = {(r.task, r.row, r.method): r for r in recorded.results}
    pairs = [(r, scores[r.task, r.row, r.method]) for r in made.results if (r.task, r.row, r.method) in scores]
    told = {(c.task, c.row, c.ours, c.theirs): c for c in recorded.contrasts}
    both = [
        (c, told[c.task, c.row, c.ours, c.theirs]) for c in made.contrasts if (c.task, c.row, c.ours, c.theirs) in told
    ]
    wrong = [] if pairs and both else ["The two have no method in common."]
    wrong += [
        f"{new.task}, {new.row}, {new.method}: {new.parameters:,.0f} LoRA parameters, recorded {old.parameters:,.0f}."
        for new, old in pairs
        if new.parameters != old.parameters
    ]
    wrong += [
        f"{new}\n  recorded: {old}"
        for new, old in both
        if ("equal" not in new.verdict or "equal" not in old.verdict) and new.difference.mean * old.difference.mean <= 0
    ]
    if wrong:
        return [], wrong
    same = sum(new.scores == old.scores for new, old in pairs)
    signs = sum(_sign(new.difference.mean) == _sign(old.difference.mean) for new, old in both)
    order = [_sign(a.mean - b.mean) == _sign(x.mean - y.mean) for (a, x), (b, y) in combinations(pairs, 2)]
    return [
        f"{same} of {len(pairs)} methods have the recorded scores to the last digit.",
        f"{signs} of {len(both)} differences have the recorded sign; no verdict contradicts the recorded one.",
        f"{sum(order)} of {len(order)} pairs of methods stand in the recorded order.",
    ], []


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a comparison that was made anew")
    found, wrong = check(Comparison.read(parser.parse_args().folder), Comparison.read(RESULTS / "compare"))
    print("\n".join(found + wrong))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
