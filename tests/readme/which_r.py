"""The parts of docs/evidence on which r, from benchmarks/results/which-r."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.compare.which_r import FOLDER
from benchmarks.compare.which_r_shown import lines_of


def which_r() -> str:
    """For each recorded task both tables, under a line that says what it is."""
    parts = []
    for found in _recorded():
        head = (
            f"`{found['task']}`, {found['train_rows']:,} training rows, {found['test_rows']:,} test rows; one rank at "
            f"every block is {found['parameters_per_rank']:,} parameters."
        )
        parts.append(f"{head}\n\n" + "\n".join(lines_of(found)))
    return "\n\n".join(parts)


def which_r_said() -> str:
    """What lower and higher ranks were worth beside 8, and little rank late in the model, where that was trained."""
    sentences = []
    for found in _recorded():
        arms = {arm["arm"]: arm["score_less_that_of_8"] for arm in found["arms"]}
        low, high = ([name for name in arms if name in names] for names in (("r = 1", "r = 2"), ("r = 32", "r = 64")))
        said = [f"rank {name.removeprefix('r = ')}: {_points(arms[name])}" for name in (*low, *high)]
        sentences.append(
            f"On `{found['task']}`, in points of accuracy beside r = 8 and each at its own rate: {'; '.join(said)}."
        )
        if "early" in arms:
            sentences.append(
                "The parameters of r = 8, but rank 15 in the first half of the blocks and 1 in the other: "
                f"{_points(arms['early'])}."
            )
    return " ".join(sentences)


def _points(difference: Sequence[float]) -> str:
    mean, low, high = difference
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _recorded() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*/which_r.json"))]
