"""Where each mark of the pictures in comparison.html stands: scores by parameters, and the ranks. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gelora_plugins.findings.stats import pareto
from gelora_plugins.findings.tables import name_of

if TYPE_CHECKING:
    from gelora_plugins.findings.results import Result

# In units of the SVG's viewBox.
WIDTH, NAMES, SCORES, STEP, TOP = 800, 270, (286, 700), 22, 30
CELL = 30  # of a rank
MOST_LETTERS = 34  # of a name; the pointer finds the rest
TICKS = 5


@dataclass(frozen=True)
class Dot:
    """A training with its score: place, ends of its interval, whether nothing has more for as few parameters."""

    x: float
    y: float
    low: float
    high: float
    front: bool
    name: str
    parameters: str
    text: str


@dataclass(frozen=True)
class Scores:
    """Scores from the fewest parameters to the most; `front` is the points of a polyline through what nothing beats."""

    dots: tuple[Dot, ...]
    front: str
    ticks: tuple[tuple[float, str], ...]
    height: float


@dataclass(frozen=True)
class Cell:
    """The rank of a block: place, what it says, and how dark it is, 0 to 1."""

    x: float
    rank: str
    text: str
    share: float


@dataclass(frozen=True)
class Pattern:
    """The ranks of one allocation, from the first block to the last."""

    y: float
    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Patterns:
    """The ranks of all that was trained on a task, an allocation a line."""

    lines: tuple[Pattern, ...]
    blocks: tuple[tuple[float, str], ...]
    width: float
    height: float


def draw_scores(results: Sequence[Result]) -> Scores:
    """The picture of the results of one task. What was trained once for two rows is one dot with both names."""
    same: dict[tuple[float, tuple[float, ...], float], list[Result]] = {}
    for result in sorted(results, key=lambda r: r.parameters):
        same.setdefault((result.parameters, result.scores, result.rate), []).append(result)
    shown = [(of[0], " = ".join(dict.fromkeys(name_of(r) for r in of))) for of in same.values()]
    best = set(pareto([(r.parameters, r.mean if r.higher_is_better else -r.mean) for r, _ in shown]))
    halves = [result.half_width or 0.0 for result, _ in shown]
    low = min((r.mean - half for (r, _), half in zip(shown, halves, strict=True)), default=0.0)
    high = max((r.mean + half for (r, _), half in zip(shown, halves, strict=True)), default=1.0)
    left, right = SCORES

    def at(value: float) -> float:
        return round(left + (right - left) * ((value - low) / (high - low) if high > low else 0.5), 2)

    dots = tuple(
        Dot(
            x=at(result.mean),
            y=TOP + STEP * (i + 0.5),
            low=at(result.mean - half),
            high=at(result.mean + half),
            front=i in best,
            name=_short(name),
            parameters=f"{result.parameters:,.0f}",
            text=f"{name}: {result.mean:.4g}"
            + (f" ± {half:.2g}" if result.half_width is not None else "")
            + f", {result.parameters:,.0f} parameters",
        )
        for i, ((result, name), half) in enumerate(zip(shown, halves, strict=True))
    )
    values = [low + (high - low) * i / (TICKS - 1) for i in range(TICKS)] if high > low else [low]
    front = " ".join(f"{dot.x},{dot.y}" for dot in dots if dot.front)
    return Scores(dots, front, tuple((at(v), f"{v:.3g}") for v in values), TOP + STEP * len(dots) + 8)


def draw_ranks(results: Sequence[Result], blocks: Sequence[str]) -> Patterns:
    """The picture of the ranks of one task: each allocation once, with the first name it has."""
    named: dict[tuple[float, ...], str] = {}
    for result in results:
        for ranks in result.ranks:
            named.setdefault(ranks, name_of(result))
    count = max((len(ranks) for ranks in named), default=0)
    lines = []
    for i, (ranks, name) in enumerate(named.items()):
        most = max(ranks)
        cells = (
            Cell(NAMES + CELL * b, f"{rank:.2g}", f"{name}, {_block(blocks, b)}: rank {rank:.3g}", rank / most)
            for b, rank in enumerate(ranks)
        )
        lines.append(Pattern(TOP + STEP * i, _short(name), tuple(cells)))
    every = 1 if count <= 12 else 5
    ticks = tuple((NAMES + CELL * (b + 0.5), str(b)) for b in range(0, count, every))
    return Patterns(tuple(lines), ticks, max(WIDTH, NAMES + CELL * count + 4), TOP + STEP * len(lines) + 8)


def _block(blocks: Sequence[str], number: int) -> str:
    return blocks[number] if number < len(blocks) else f"block {number}"


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"
