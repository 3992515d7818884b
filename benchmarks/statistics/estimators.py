"""How well the estimators find a known dimension, and how honest their standard errors are.

    python -m benchmarks.statistics.estimators [--sets 200] [--networks 60]

Values: sets of 1000 points of a known density and dimension. `coverage` is how often the 95 % interval holds the
estimator's own mean over the sets: the interval speaks of chance, not of the bias that 1000 points in a density that
is not constant leave in high dimensions. Beside it, for twonn_mle, the coverage of the chi-squared interval that takes
the ratios for independent.

Differences: hidden states of a toy network (random residual layers, tanh) over points of a known dimension. The true
standard error of the growth of the dimension over a layer is its spread over other points in the same network; the
stated one comes from the halves that the two boundaries share, or, as a control, from both as if they were unrelated.
"""

import argparse
import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import chi2

from benchmarks.machine import record
from gelora_plugins.dimension.estimators import gride, mle, twonn, twonn_mle
from gelora_plugins.dimension.halves import halves
from gelora_plugins.dimension.measure import estimate_dimensions
from gelora_plugins.dimension.profile import DimensionEstimate

NUM_POINTS = 1000
DIMENSIONS = (3, 8, 15, 20)
DENSITIES = ("gaussian", "uniform ball")
WIDTH, NUM_LAYERS = 64, 4
ESTIMATORS = {"twonn": twonn, "twonn_mle": twonn_mle, "gride": gride, "mle": mle}


def points(density: str, dim: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng([seed, dim, DENSITIES.index(density)])
    x = rng.standard_normal((NUM_POINTS, dim))
    if density == "uniform ball":
        x *= rng.uniform(size=(NUM_POINTS, 1)) ** (1 / dim) / np.linalg.norm(x, axis=1, keepdims=True)
    return torch.from_numpy(x)


def holds_as_if_independent(estimate: DimensionEstimate, mean: float) -> bool:
    """Whether the interval of twonn_mle for independent ratios holds `mean`: 2 d T ~ chi-squared, 2 m degrees."""
    m = int(NUM_POINTS * 0.9)
    low, high = chi2.ppf([0.025, 0.975], 2 * m) * estimate.value / (2 * (m - 1))
    return bool(low <= mean <= high)


def value_rows(num_sets: int) -> Iterator[dict[str, object]]:
    rows = halves(NUM_POINTS, 0)
    for density in DENSITIES:
        for dim in DIMENSIONS:
            sets = [points(density, dim, seed) for seed in range(num_sets)]
            for name, estimator in ESTIMATORS.items():
                found = [estimator.estimate(estimator.search(x), rows) for x in sets]
                values = np.array([estimate.value for estimate in found])
                mean = values.mean()
                row = {
                    "mean": mean,
                    "sd": values.std(ddof=1),
                    "rmse": np.sqrt(np.mean((values - dim) ** 2)),
                    "stated_se": np.mean([estimate.std_error for estimate in found]),
                    "coverage": np.mean([estimate.interval[0] <= mean <= estimate.interval[1] for estimate in found]),
                }
                if name == "twonn_mle":
                    row["coverage_as_if_independent"] = np.mean([holds_as_if_independent(e, mean) for e in found])
                rounded = {key: round(float(value), 4) for key, value in row.items()}
                yield {"density": density, "dimension": dim, "estimator": name, **rounded}


def hidden_states(dim: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Points at the NUM_LAYERS + 1 boundaries of the network that belongs to `dim`."""
    weights = torch.Generator().manual_seed(dim)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=weights) / math.sqrt(rows)

    x = torch.randn(NUM_POINTS, dim, generator=torch.Generator().manual_seed(1000 + seed))
    found = [torch.tanh(x @ matrix(dim, WIDTH))]
    for _ in range(NUM_LAYERS):
        found.append(found[-1] + torch.tanh(1.5 * found[-1] @ matrix(WIDTH, 2 * WIDTH)) @ matrix(2 * WIDTH, WIDTH))
    return tuple(found)


def difference_rows(num_networks: int) -> Iterator[dict[str, object]]:
    for dim in DIMENSIONS[:3]:
        sets = [hidden_states(dim, seed) for seed in range(num_networks)]
        for name, estimator in ESTIMATORS.items():
            found = [estimate_dimensions(x, estimator)[0] for x in sets]
            growth = np.array([np.diff([e.value for e in estimates]) for estimates in found])
            shared = np.array([np.diff([e.replicates for e in es], axis=0).std(axis=1, ddof=1) for es in found])
            errors = np.array([[e.std_error for e in estimates] for estimates in found])
            unrelated = np.hypot(errors[:, 1:], errors[:, :-1])
            true = growth.std(axis=0, ddof=1)
            row = {
                "true_se": true.mean(),
                "stated_over_true": (shared.mean(axis=0) / true).mean(),
                "least": (shared.mean(axis=0) / true).min(),
                "most": (shared.mean(axis=0) / true).max(),
                "unrelated_over_true": (unrelated.mean(axis=0) / true).mean(),
            }
            yield {"dimension": dim, "estimator": name, **{key: round(float(value), 4) for key, value in row.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=200, help="for each dimension and density")
    parser.add_argument("--networks", type=int, default=60, help="sets of points through each toy network")
    options = parser.parse_args()
    rows = []
    print("density         d  estimator     mean      sd    rmse  stated se  coverage  as if independent")
    for row in value_rows(options.sets):
        rows.append(row)
        line = f"{row['density']:14s}{row['dimension']:3d}  {row['estimator']:10s}{row['mean']:8.2f}{row['sd']:8.2f}"
        line += f"{row['rmse']:8.2f}{row['stated_se']:11.2f}{row['coverage']:10.3f}"
        if "coverage_as_if_independent" in row:
            line += f"{row['coverage_as_if_independent']:19.3f}"
        print(line, flush=True)
    differences = []
    print("\ngrowth over a layer:\n  d  estimator   true se  stated / true  (least, most)  as if unrelated / true")
    for row in difference_rows(options.networks):
        differences.append(row)
        print(
            f"{row['dimension']:3d}  {row['estimator']:10s}{row['true_se']:9.3f}{row['stated_over_true']:15.2f}"
            f"   ({row['least']:.2f}, {row['most']:.2f}){row['unrelated_over_true']:20.2f}",
            flush=True,
        )
    sizes = {"num_sets": options.sets, "num_networks": options.networks, "num_points": NUM_POINTS}
    record("estimators", {**sizes, "rows": rows, "differences": differences})


if __name__ == "__main__":
    main()
