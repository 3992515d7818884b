"""Clean point sets of known dimension, the same to the last bit on every machine and numpy >= 1.17.

Coordinates and embedding are rounded to multiples of 2^-20: every product and sum of the matrix product is then
exact in float64, so no BLAS can disagree with another about the points.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

NUM_POINTS = 400
SEEDS = range(5)
DIMENSIONS = (2, 5, 10, 20)
SHAPES = (("gaussian", 768), ("uniform", 24))  # (density, embedding dimension)


def clean_sets() -> Iterator[tuple[str, np.ndarray]]:
    """(name, points (NUM_POINTS, D) float64) for every seed, dimension and shape."""
    for density, embedding_dim in SHAPES:
        for dim in DIMENSIONS:
            for seed in SEEDS:
                yield f"{density} d={dim} D={embedding_dim} seed={seed}", clean_set(density, dim, embedding_dim, seed)


def clean_set(density: str, dim: int, embedding_dim: int, seed: int) -> np.ndarray:
    """Points on a linear subspace of dimension `dim`, rotated into `embedding_dim` coordinates."""
    rng = np.random.default_rng([seed, dim, embedding_dim])
    rotation = np.linalg.qr(rng.standard_normal((embedding_dim, dim)))[0]
    if density == "gaussian":
        inner = rng.standard_normal((NUM_POINTS, dim))
    else:
        inner = rng.uniform(-1.0, 1.0, (NUM_POINTS, dim))
    return _on_grid(inner) @ _on_grid(rotation).T


def checksum(points: np.ndarray) -> str:
    """SHA-256 of the points' bytes."""
    return hashlib.sha256(np.ascontiguousarray(points, dtype="<f8").tobytes()).hexdigest()


def _on_grid(values: np.ndarray) -> np.ndarray:
    return np.round(values * 2**20) / 2**20 + 0.0  # + 0.0 turns -0.0 into 0.0
