"""Sets of points for the tests of neighbours, estimators and boundaries."""

import numpy as np
import torch
from scipy.spatial.distance import cdist

from gelora_plugins.dimension.neighbours import find_neighbours


def gaussian(n, dim, embedding_dim=None, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((n, dim))
    if embedding_dim:
        points = points @ np.linalg.qr(rng.standard_normal((embedding_dim, dim)))[0].T
    return torch.from_numpy(points)


def brute_force(points, k=2):
    points = points.double().numpy()
    distances = cdist(points, points)
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, :k]


def nearest(points):
    return find_neighbours(points, 1)
