"""How often the 95 % interval of a paired difference holds the true one: python -m benchmarks.statistics.coverage

Student's t, which `gelora compare` takes, beside the percentile bootstrap and the studentised one (Hall 1988), with the
widths of their intervals: with few seeds some resamples have next to no spread, and the studentised interval explodes.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import record
from gelora_plugins.findings.stats import paired_difference

DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "t, 4 degrees": lambda rng, n: rng.standard_t(4, size=n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
}


def percentile(sample: np.ndarray) -> tuple[float, float]:
    index = np.array(list(itertools.product(range(len(sample)), repeat=len(sample))))
    low, high = np.quantile(sample[index].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def studentised(sample: np.ndarray) -> tuple[float, float]:
    """Symmetric: |mean* - mean| / standard error* of every resample that has a spread."""
    index = np.array(list(itertools.product(range(len(sample)), repeat=len(sample))))
    resamples = sample[index]
    errors = resamples.std(axis=1, ddof=1)
    kept = errors > 1e-9 * np.abs(sample).max()
    ratios = np.abs(resamples[kept].mean(axis=1) - sample.mean()) / errors[kept]
    half = float(np.quantile(ratios, 0.95)) * sample.std(ddof=1)
    return float(sample.mean() - half), float(sample.mean() + half)


def student(sample: np.ndarray) -> tuple[float, float]:
    interval = paired_difference(sample.tolist(), [0.0] * len(sample)).interval
    assert interval is not None
    return interval


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for density, draw in DRAWS.items():
        samples = [draw(rng, options.seeds) for _ in range(options.rounds)]
        for method in (percentile, studentised, student):
            intervals = [method(sample) for sample in samples]
            held = float(np.mean([low <= 0 <= high for low, high in intervals]))
            widths = [high - low for low, high in intervals]
            median, widest = float(np.median(widths)), float(np.quantile(widths, 0.95))
            rows.append({"density": density, "interval": method.__name__, "coverage": held})
            rows[-1] |= {"median_width": median, "width_95": widest}
            print(f"{density:14s} {method.__name__:12s} {held:.1%} {median:.2f} {widest:.2f}", flush=True)
    record("compare_coverage", {"rounds": options.rounds, "seeds": options.seeds, "rows": rows})


if __name__ == "__main__":
    main()
