"""The parts of docs/evidence on which r, from benchmarks/results/which-r."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.compare.which_r import FOLDER
from benchmarks.compare.which_r_shown import HALF, TWICE, lines_of


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


SAID = {
    "r = 1": "rank 1",
    "r = 2": "rank 2",
    "r = 32": "rank 32",
    "r = 64": "rank 64",
    TWICE: "rank 8 at twice its rate",
    HALF: "at half of it",
}
OF_EIGHT = {
    "budget": "by the policy `budget`",
    "early": "as rank 15 in the first half of the blocks and 1 in the other",
    "late": "the other way round",
}


def which_r_said() -> str:
    """What other ranks, other rates and other allocations were worth beside rank 8, where they were trained."""
    sentences = []
    for found in _recorded():
        arms = {arm["arm"]: arm["score_less_that_of_8"] for arm in found["arms"]}
        ranks, moved = (
            "; ".join(f"{words}: {_points(arms[name])}" for name, words in names.items() if name in arms)
            for names in (SAID, OF_EIGHT)
        )
        sentences.append(f"On `{found['task']}`, in points of accuracy beside r = 8 and each at its own rate: {ranks}.")
        sentences += [f"The parameters of r = 8, {moved}."] if moved else []
    return " ".join(sentences)


def _points(difference: Sequence[float]) -> str:
    mean, low, high = difference
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _recorded() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*/which_r.json"))]
