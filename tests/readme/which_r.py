"""The tables of "Which r?" in docs/evidence, from benchmarks/results/which-r."""

import json
from pathlib import Path

from benchmarks.compare.which_r import FOLDER, lines_of


def which_r() -> str:
    """For each recorded task both tables, under a line that says what it is."""
    parts = []
    for path in sorted(Path(FOLDER).glob("*/which_r.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        head = (
            f"`{found['task']}`, {found['train_rows']:,} training rows, {found['test_rows']:,} test rows; one rank at "
            f"every block is {found['parameters_per_rank']:,} parameters."
        )
        parts.append(f"{head}\n\n" + "\n".join(lines_of(found)))
    return "\n\n".join(parts)
