"""How often the verdict says "blocks differ": on data without any difference, and on planted ones.

    python -m benchmarks.statistics.verdict [--sets 200]

Points at 13 boundaries of 12 blocks go through the real estimator and its random halves; nothing else is planted.
Alike: points of one dimension, 10, at every boundary, drawn anew for each ("independent"), or the same points turned
and noised a little more at each ("shared", as hidden states of the same documents are), or of a dimension that falls.
Planted: the dimension grows over one block, by 2, 4 or 8, and stays there.
"""

import argparse

import numpy as np
import torch

from benchmarks.machine import record
from gelora_plugins.dimension.estimators import twonn_mle
from gelora_plugins.dimension.measure import estimate_dimensions
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.layout import Block, Linear, ModelLayout
from gelora_plugins.ranks.verdict import tell_apart

NUM_BLOCKS, WIDTH, DIMENSION = 12, 32, 10
NUM_POINTS = (256, 1024)
LAYOUT = ModelLayout(
    "planted", "", (tuple(Block(f"layers.{i}", (Linear(f"layers.{i}.up", 8, 8),)) for i in range(NUM_BLOCKS)),)
)
ALIKE = ("independent", "shared", "falling")
GROWTHS = (2, 4, 8)


def gaussian(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    return rng.standard_normal((n, dim)) @ np.linalg.qr(rng.standard_normal((WIDTH, dim)))[0].T


def boundaries(case: str | int, n: int, seed: int) -> list[torch.Tensor]:
    rng = np.random.default_rng([seed, n])
    if case == "independent":
        found = [gaussian(rng, n, DIMENSION) for _ in range(NUM_BLOCKS + 1)]
    elif case == "falling":
        found = [gaussian(rng, n, 2 + NUM_BLOCKS - i) for i in range(NUM_BLOCKS + 1)]
    else:  # the same documents at every boundary, with a little of their own inside the DIMENSION coordinates
        grown = 0 if case == "shared" else int(case)
        base, found = rng.standard_normal((n, DIMENSION + grown)), []
        for i in range(NUM_BLOCKS + 1):
            dim = DIMENSION + (grown if i > NUM_BLOCKS // 2 else 0)
            here = base[:, :dim] + 0.3 * rng.standard_normal((n, dim))
            found.append(here @ np.linalg.qr(rng.standard_normal((WIDTH, dim)))[0].T)
    return [torch.from_numpy(x.astype(np.float32)) for x in found]


def profile(points: list[torch.Tensor], seed: int) -> DimensionProfile:
    estimates, repeats = estimate_dimensions(points, twonn_mle, standardise=False, seed=seed)
    n = len(points[0])
    return DimensionProfile(LAYOUT, estimates, "twonn_mle", "mean", seed, n, 0, repeats, n, 0.0, "0" * 64)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sets", type=int, default=200)
    sets = parser.parse_args().sets
    rows = []
    for n in NUM_POINTS:
        for case in (*ALIKE, *GROWTHS):
            said = sum(tell_apart(profile(boundaries(case, n, seed), seed)).differ for seed in range(sets))
            rows.append({"points": n, "case": case, "sets": sets, "differ": said})
            print(rows[-1], flush=True)
    record("verdict", {"blocks": NUM_BLOCKS, "dimension": DIMENSION, "rows": rows})


if __name__ == "__main__":
    main()
