"""How often intervals hold where the test rows are a draw, too: python -m benchmarks.statistics.two_way

Two arms, 5 or 10 trainings each, answer test rows right or wrong. A row is harder or easier for both, and suits one of
them better (the luck of the test set); a seed is better or worse as a whole, and each answer has luck of its own. The
true difference is over all rows that could be drawn. Student's t over seeds takes the rows as they are.
"""

import argparse
import statistics
from typing import Any

import numpy as np

from benchmarks.machine import record
from gelora_plugins.findings.stats import paired_difference

# Standard deviations on the scale of the log odds: (of a seed, of a row's preference for one arm).
CASES = {"seeds alone": (0.1, 0.0), "rows alone": (0.0, 4.0), "both": (0.1, 4.0), "neither": (0.0, 0.0)}
EDGE = 0.2  # log odds by which the first arm is better


def answers(rng: np.random.Generator, seeds: int, rows: int, of_seed: float, of_row: float) -> np.ndarray:
    """(arms, seeds, rows) of 0 and 1."""
    hard = rng.normal(1.5, 4.0, rows)
    leaning = np.stack([np.full(rows, EDGE) + rng.normal(0, of_row, rows) / 2, np.zeros(rows)])
    luck = rng.normal(0, of_seed, (2, seeds, 1))
    odds = hard + leaning[:, None, :] + luck
    return (rng.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(float)


def truth(of_seed: float, of_row: float) -> float:
    """The difference over very many rows and seeds."""
    drawn = answers(np.random.default_rng(1), 100, 40_000, of_seed, of_row)
    return 100 * float(drawn[0].mean() - drawn[1].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=400)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for seeds in (5, 10):
        for case, (of_seed, of_row) in CASES.items():
            rng, true = np.random.default_rng(0), truth(of_seed, of_row)
            held: dict[str, list[bool]] = {"two_way": [], "seeds": []}
            widths: dict[str, list[float]] = {"two_way": [], "seeds": []}
            for _ in range(options.rounds):
                ours, theirs = 100 * answers(rng, seeds, options.rows, of_seed, of_row)
                scores = ours.mean(1).tolist(), theirs.mean(1).tolist()
                parts = (ours.tolist(), theirs.tolist())
                for name, interval in (
                    ("two_way", paired_difference(*scores, parts).interval),
                    ("seeds", paired_difference(*scores).interval),
                ):
                    assert interval is not None
                    held[name].append(interval[0] <= true <= interval[1])
                    widths[name].append(interval[1] - interval[0])
            row: dict[str, Any] = {"seeds": seeds, "luck": case, "true": true}
            for name, values in held.items():
                row |= {f"{name}_coverage": statistics.fmean(values), f"{name}_width": statistics.median(widths[name])}
            found.append(row)
            print(row, flush=True)
    record("two_way", {"rounds": options.rounds, "test_rows": options.rows, "rows": found})


if __name__ == "__main__":
    main()
