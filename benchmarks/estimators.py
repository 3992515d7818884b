"""How well the two TwoNN estimators find a known dimension, and how honest the interval of twonn_mle is.

    python benchmarks/estimators.py

`coverage` is how often the 95 % interval holds the estimator's own mean over the sets: the interval speaks of chance,
not of the bias that 1000 points in a density that is not constant leave in high dimensions.
"""

import numpy as np
import torch
from machine import record

from gelora_plugins.dimension import DimensionEstimate
from gelora_plugins.estimators import twonn, twonn_mle

NUM_SETS = 200  # for each dimension and density
NUM_POINTS = 1000
DIMENSIONS = (3, 8, 15, 20)
DENSITIES = ("gaussian", "uniform ball")


def points(density: str, dim: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng([seed, dim, DENSITIES.index(density)])
    x = rng.standard_normal((NUM_POINTS, dim))
    if density == "uniform ball":
        x *= rng.uniform(size=(NUM_POINTS, 1)) ** (1 / dim) / np.linalg.norm(x, axis=1, keepdims=True)
    return torch.from_numpy(x)


def figures(estimates: list[DimensionEstimate], dim: int) -> dict[str, float]:
    values = np.array([estimate.value for estimate in estimates])
    mean = values.mean()
    result = {"mean": mean, "sd": values.std(ddof=1), "rmse": np.sqrt(np.mean((values - dim) ** 2))}
    if estimates[0].interval is not None:
        result["stated_se"] = np.mean([estimate.std_error for estimate in estimates])
        result["coverage"] = np.mean([estimate.interval[0] <= mean <= estimate.interval[1] for estimate in estimates])
    return {name: round(float(value), 4) for name, value in result.items()}


def main() -> None:
    rows = []
    print("density         d  estimator     mean      sd    rmse  stated se  coverage")
    for density in DENSITIES:
        for dim in DIMENSIONS:
            sets = [points(density, dim, seed) for seed in range(NUM_SETS)]
            for name, estimator in (("twonn", twonn), ("twonn_mle", twonn_mle)):
                found = figures([estimator(x) for x in sets], dim)
                rows.append({"density": density, "dimension": dim, "estimator": name, **found})
                line = f"{density:14s}{dim:3d}  {name:10s}{found['mean']:8.2f}{found['sd']:8.2f}{found['rmse']:8.2f}"
                if "coverage" in found:
                    line += f"{found['stated_se']:11.2f}{found['coverage']:10.3f}"
                print(line)
    record("estimators", {"num_sets": NUM_SETS, "num_points": NUM_POINTS, "rows": rows})


if __name__ == "__main__":
    main()
