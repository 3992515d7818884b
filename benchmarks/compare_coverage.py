"""How often the 95 % interval of a paired difference holds the true one: python benchmarks/compare_coverage.py

The studentised bootstrap of `gelora compare` beside the plain percentile bootstrap and Student's t.
"""

import argparse
import itertools
import math
from collections.abc import Callable

import numpy as np
from machine import record
from scipy import stats

from gelora_plugins.compare_stats import paired_difference

DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "t, 4 degrees": lambda rng, n: rng.standard_t(4, size=n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
}


def percentile(sample: np.ndarray) -> tuple[float, float]:
    index = np.array(list(itertools.product(range(len(sample)), repeat=len(sample))))
    low, high = np.quantile(sample[index].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def student(sample: np.ndarray) -> tuple[float, float]:
    half = stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def studentised(sample: np.ndarray) -> tuple[float, float]:
    interval = paired_difference(sample.tolist(), [0.0] * len(sample)).interval
    assert interval is not None
    return interval


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    for density, draw in DRAWS.items():
        samples = [draw(rng, options.seeds) for _ in range(options.rounds)]
        for method in (percentile, studentised, student):
            held = np.mean([low <= 0 <= high for low, high in map(method, samples)])
            rows.append({"density": density, "interval": method.__name__, "coverage": float(held)})
            print(f"{density:14s} {method.__name__:12s} {held:.1%}", flush=True)
    record("compare_coverage", {"rounds": options.rounds, "seeds": options.seeds, "rows": rows})


if __name__ == "__main__":
    main()
