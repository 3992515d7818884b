"""How often a method is told apart from itself with its nominal rates shifted: python -m benchmarks.statistics.null


A simulation: no model is trained. The loss is a parabola over the logarithm of the rate up to a cliff, as measured on
`docstrings`: 0.1 above its lowest at a factor of 1.8, and the score falls by 48 points where the loss rises by 1. The
protocol of `gelora compare` now stands beside that of before: a grid of factor 3, one seed, the score of a fifth of the
rows, the interval at the two chosen rates alone. PREREGISTRATION.md says what is expected. Last, how often a method
that is truly better by some points is told apart.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import record
from gelora_plugins.compare.rates import choose, next_runs
from gelora_plugins.findings.stats import paired_difference, verdict, worst

GRID = (3e-4, 1e-3, 3e-3, 1e-2)
CHOOSING, JUDGING = range(1000, 1005), range(5)
CONSTANT, LOWEST, BEND = 2.06, 0.8, 0.3  # losses: of the constant answer, at the best rate; how they rise from there
BEST_SCORE, POINTS = 75.0, 48.0  # the score at the best rate; by how much it falls where the loss rises by 1
LEVEL, NOISE = 0.1, 0.06  # of the held-out loss: of a seed's rows at every rate, and of each run
SCORE_LEVEL, SCORE_NOISE = 1.5, 1.2  # of the score, in points: of a seed with every method, and of each run
FIFTH_NOISE = 3.0  # of the score of a hundred held-out rows, in points
CHANCE = 13.0  # the score of a diverged run


class World:
    """One task and one method: where its best rate and its cliff are, and the luck of its seeds."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.best = math.exp(rng.uniform(math.log(1e-3), math.log(2e-2)))
        self.cliff = self.best * math.exp(rng.uniform(math.log(1.2), math.log(4.0)))
        self.level = {seed: rng.normal() for seed in (*CHOOSING, *JUDGING)}
        self.edge = {seed: self.cliff * math.exp(rng.normal(0, 0.1)) for seed in self.level}

    def loss(self, rate: float) -> float:
        return LOWEST + BEND * math.log(rate / self.best) ** 2

    def held_out(self, rate: float, seed: int) -> float:
        """The loss above that of the constant answer."""
        if rate >= self.edge[seed]:
            return 0.02
        return min(self.loss(rate) + LEVEL * self.level[seed] + self.rng.normal(0, NOISE) - CONSTANT, 0.02)

    def score(self, rate: float, seed: int, noise: float = SCORE_NOISE) -> float | None:
        """In points; None where it has diverged."""
        if rate >= self.edge[seed]:
            return None
        found = max(BEST_SCORE - POINTS * (self.loss(rate) - LOWEST), CHANCE)
        return found + SCORE_LEVEL * self.level[seed] + float(self.rng.normal(0, noise))


def now(world: World, shift: float, better: float = 0.0) -> tuple[str, float]:
    """(what is said of the second of two that differ by `shift` and `better`, the factor between their rates)."""
    could_be, rates = [], []
    for factor, more in ((1.0, 0.0), (shift, better)):
        found: dict[float, dict[int, float]] = {}
        while runs := next_runs(found, GRID, CHOOSING):
            for rate, seed in runs:
                found.setdefault(rate, {})[seed] = world.held_out(rate * factor, seed)
        choice = choose(found, CHOOSING)
        assert choice.rate is not None
        judged = {rate: [world.score(rate * factor, s) for s in JUDGING] for rate in (choice.rate, *choice.as_good)}
        if None in judged[choice.rate]:
            return "no verdict", 1.0
        could_be.append(
            [[s + more for s in scores if s is not None] for scores in judged.values() if None not in scores]
        )
        rates.append(choice.rate * factor)
    difference = worst([paired_difference(ours, theirs) for ours in could_be[1] for theirs in could_be[0]])
    return verdict(difference, difference.p), max(rates) / min(rates)


def before(world: World, shift: float, better: float = 0.0) -> tuple[str, float]:
    """As `now`."""
    scores, rates = [], []
    for factor, more in ((1.0, 0.0), (shift, better)):
        held_out = {rate: world.score(rate * factor, 0, FIFTH_NOISE) or CHANCE for rate in GRID}
        rates.append(max(GRID, key=lambda rate: held_out[rate]) * factor)
        scores.append([(world.score(rates[-1], seed) or CHANCE) + more for seed in JUDGING])
    difference = paired_difference(scores[1], scores[0])
    return verdict(difference, difference.p), max(rates) / min(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []
    worlds: dict[str, tuple[Callable[[np.random.Generator], float], float]] = {
        "itself, rates shifted by sqrt(3)": (lambda rng: math.sqrt(3), 0.0),
        "itself, rates shifted by 1 to 3": (lambda rng: math.exp(rng.uniform(0, math.log(3))), 0.0),
        "2 points better": (lambda rng: 1.0, 2.0),
        "4 points better": (lambda rng: 1.0, 4.0),
    }
    for name, (draw, better) in worlds.items():
        for protocol in (now, before):
            rng = np.random.default_rng(0)
            found = [protocol(World(rng), draw(rng), better) for _ in range(rounds)]
            row: dict[str, Any] = {"against": name, "protocol": protocol.__name__}
            row |= {word: sum(said == word for said, _ in found) / rounds for word in ("better", "worse")}
            row["no verdict"] = sum(said == "no verdict" for said, _ in found) / rounds
            row["factor between the rates, 95 %"] = float(np.quantile([factor for _, factor in found], 0.95))
            rows.append(row)
            print(row, flush=True)
    record("compare_null", {"rounds": rounds, "rows": rows})


if __name__ == "__main__":
    main()
