"""How often the intervals of `gelora compare --headroom` hold: python -m benchmarks.statistics.headroom

A simulation: no model is trained. The score of an allocation with a seed is the effect of the allocation, that of the
seed, and luck of a standard deviation of 1, which is the unit here. "won": how often something is said to be there to
be won, which on a task where all allocations are alike is to be said in at most 5 %. "nothing": how often nothing
beyond a margin of 2 is said to be there. The effects are normal as the intervals suppose, or most allocations are like
uniform and one in ten falls off by 4 ("starved"), or excels by 4 ("stars").
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.machine import record
from gelora_plugins.findings.headroom import expected_largest, two_way_layout

SIZES = ((6, 3), (18, 5), (18, 10))  # allocations, seeds
OF_SEED, MARGIN = 2.0, 2.0
# Standard deviation of the effects, their mean over uniform, and by how much one in ten is better than that.
CASES = {
    "all alike": (0.0, 0.0, 0.0),
    "all alike, worse than uniform": (0.0, -1.0, 0.0),
    "sd 0.25": (0.25, 0.0, 0.0),
    "sd 0.5": (0.5, 0.0, 0.0),
    "sd 1": (1.0, 0.0, 0.0),
    "sd 2": (2.0, 0.0, 0.0),
    "sd 1, worse than uniform": (1.0, -1.0, 0.0),
    "starved": (0.0, 0.0, -4.0),
    "stars": (0.0, 0.0, 4.0),
}
SHARE = 0.1


def scores(rng: np.random.Generator, size: tuple[int, int], case: str) -> tuple[np.ndarray, np.ndarray]:
    """Of (allocations, seeds), and of uniform."""
    sd, mean, jump = CASES[case]
    effects = mean + sd * rng.normal(size=size[0]) + jump * (rng.random(size[0]) < SHARE)
    seeds = OF_SEED * rng.normal(size=size[1])
    return effects[:, None] + seeds + rng.normal(size=size), seeds + rng.normal(size=size[1])


def truth(count: int, case: str) -> dict[str, float]:
    """Of the effects: standard deviation, mean, and the expected best of `count`."""
    sd, mean, jump = CASES[case]
    if not jump:
        return {"sd": sd, "mean": mean, "gain": mean + expected_largest(count) * sd}
    best = jump * (1 - (1 - SHARE) ** count) if jump > 0 else jump * SHARE**count
    return {"sd": abs(jump) * (SHARE * (1 - SHARE)) ** 0.5, "mean": SHARE * jump, "gain": best}


def outcomes(size: tuple[int, int], case: str, rounds: int) -> Iterator[dict[str, float]]:
    true = truth(size[0], case)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        found = two_way_layout(*scores(rng, size, case))
        ends = {"sd": found.sd_interval, "mean": found.mean_interval, "gain": found.gain_interval}
        row: dict[str, float] = {name: low <= true[name] <= high for name, (low, high) in ends.items()}
        row |= {"below the upper end": true["gain"] <= found.gain_interval[1], "won": found.gain_interval[0] > 0}
        yield row | {"nothing": found.gain_interval[1] <= MARGIN, "upper": found.gain_interval[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4000)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        for case in CASES:
            found = list(outcomes(size, case, rounds))
            row: dict[str, Any] = {"allocations": size[0], "seeds": size[1], "case": case, "true": truth(size[0], case)}
            row |= {name: statistics.fmean(each[name] for each in found) for name in found[0] if name != "upper"}
            rows.append(row | {"median upper end": statistics.median(each["upper"] for each in found)})
            print(rows[-1], flush=True)
    record("headroom", {"rounds": rounds, "margin": MARGIN, "rows": rows})


if __name__ == "__main__":
    main()
