"""What exact nearest neighbours cost: beside one float32 product of the same size, and beside other tools.

    python -m benchmarks.speed.neighbours [--points 1000 4000 8000] [--features 1024] [--rounds 5] [--dadapy PYTHON]

The points are tanh features of 15 latent coordinates with noise, float32. The competitors take turns in each round, on
the threads that OMP_NUM_THREADS allows; ratios are taken round by round, and their medians are reported. DADApy needs
numpy < 2 and so an environment of its own (see tests/reference/record_dadapy.py); --dadapy names its Python.

The second table is of points that float32 cannot vouch for, at the second size: what being exact costs there.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from skdim.id import TwoNN
from sklearn.neighbors import NearestNeighbors

from benchmarks.machine import record
from gelora_plugins.dimension.estimators import twonn
from gelora_plugins.dimension.neighbours import neighbour_distances

DADAPY = """
import sys, time
import numpy as np
from dadapy import Data
points = np.load(sys.argv[1]).astype(np.float64)
started = time.perf_counter()
Data(points, n_jobs=int(sys.argv[2])).compute_id_2NN()
print(time.perf_counter() - started)
"""


def make_points(n: int, features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    latent = torch.randn(n, 15, generator=generator)
    x = torch.tanh(latent @ torch.randn(15, features, generator=generator) / 15**0.5)
    return x + 0.1 * torch.randn(n, features, generator=generator)


def timed(run: Callable[[], object]) -> Callable[[], float]:
    def once() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return once


def competitors(points: torch.Tensor, file: Path, dadapy: str | None) -> dict[str, Callable[[], float]]:
    """Each runs once on `points` and gives the seconds it took."""
    array = points.numpy()
    np.save(file, array)

    def in_its_environment() -> float:
        command = [dadapy, "-W", "ignore", "-c", DADAPY, file, str(torch.get_num_threads())]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    found = {
        "product": timed(lambda: points @ points.T),
        "gelora, distances": timed(lambda: neighbour_distances(points, 2)),
        "gelora, twonn and its error": timed(lambda: twonn(points)),
        "scikit-learn brute": timed(lambda: NearestNeighbors(n_neighbors=2, algorithm="brute").fit(array).kneighbors()),
        "scikit-dimension, TwoNN": timed(lambda: TwoNN().fit(array)),
    }
    return found | ({"DADApy, 2NN": in_its_environment} if dadapy else {})


def largest_error(points: torch.Tensor) -> float:
    """Relative, of the distances of 100 points, against float64 differences."""
    found = neighbour_distances(points, 2)
    rows = torch.arange(0, len(points), max(1, len(points) // 100))
    every = torch.cdist(points[rows].double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = every.topk(3, largest=False).values[:, 1:]  # the first is the point itself
    return float((found[rows] / exact - 1).abs().max())


def take_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    for run in list(runs.values())[:2]:
        run()  # the first products of a process are slower
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def over_product(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(s / p for s, p in zip(taken, seconds["product"], strict=True)), 3)
        for name, taken in seconds.items()
    }


def hard(points: torch.Tensor) -> dict[str, torch.Tensor]:
    rogue, far, clusters = (points.clone() for _ in range(3))
    tight = points.double()  # in float32 such a cluster is one point
    rogue[:, 0] *= 1e4
    far[0] += 1e5
    clusters[::2] += 1000
    tight[: len(tight) // 4] = tight[: len(tight) // 4] * 1e-6 + 100
    return {
        "common": points,
        "bfloat16": points.bfloat16(),
        "a coordinate of 5000": torch.cat([points[:, 1:], torch.full((len(points), 1), 5000.0)], dim=1),
        "a rogue coordinate": rogue,
        "one point far away": far,
        "two clusters": clusters,
        "a quarter in a tight cluster": tight,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--points", type=int, nargs="+", default=[1000, 4000, 8000])
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dadapy", default=None, help="Python of an environment with DADApy")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n in options.points:
            points = make_points(n, options.features)
            seconds = take_turns(competitors(points, Path(folder, "points.npy"), options.dadapy), options.rounds)
            ratios, error = over_product(seconds), largest_error(points)
            rows.append({"points": n, "seconds": seconds, "over_product": ratios, "largest_error": error})
            print(f"{n} points of {options.features} features, largest relative error {error:.1e}")
            for name, ratio in ratios.items():
                print(
                    f"  {name:28s}{statistics.median(seconds[name]):9.3f} s{ratio:8.2f} times the product", flush=True
                )
    points = make_points(sorted(options.points)[len(options.points) // 2], options.features)
    hard_rows = {}
    print(f"\n{len(points)} points:")
    for name, spoilt in hard(points).items():
        runs = {
            "product": timed(partial(torch.mm, points, points.T)),
            "ours": timed(partial(neighbour_distances, spoilt)),
        }
        ratio, error = over_product(take_turns(runs, options.rounds))["ours"], largest_error(spoilt)
        hard_rows[name] = {"over_product": ratio, "largest_error": error}
        print(f"  {name:30s}{ratio:8.2f} times the product, largest relative error {error:.1e}", flush=True)
    found = {"features": options.features, "threads": torch.get_num_threads(), "rounds": options.rounds}
    record("neighbours", {**found, "rows": rows, "hard": hard_rows})


if __name__ == "__main__":
    main()
