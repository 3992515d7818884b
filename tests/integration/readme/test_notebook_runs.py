"""examples/quickstart.ipynb runs, on a tiny model, and what is saved in it is of the code that is in it."""

import base64
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins.demo import MODEL
from tests.readme import notebook
from tests.support.training import ranks_by_block


def kinds(cell: dict[str, Any]) -> list[str]:
    """What a cell shows: kinds of data, or where it is printed."""
    return [kind for output in cell["outputs"] for kind in output.get("data", [output.get("name")])]


def test_the_notebook_runs_and_shows_what_is_saved_in_it(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gelora_plugins.demo.smollm2", lambda: str(workplace / MODEL))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    saved, found = notebook.read(), notebook.read()
    names = notebook.run(found)
    assert ranks_by_block(names["model"]) == list(names["plan"].ranks)
    for cell, now in zip(notebook.code_cells(saved), notebook.code_cells(found), strict=True):
        assert cell["execution_count"] == now["execution_count"]
        assert kinds(cell) == kinds(now), "".join(cell["source"])


def test_what_is_saved_is_of_this_code() -> None:
    saved = notebook.read()
    assert saved["metadata"]["gelora"]["outputs_of"] == notebook.digest(saved), "run: python -m tests.readme.notebook"
    pictures = [o["data"]["image/png"] for c in notebook.code_cells(saved) for o in c["outputs"] if "png" in str(o)]
    assert base64.b64decode(pictures[0]).startswith(b"\x89PNG")


def test_a_change_of_the_code_is_seen() -> None:
    changed = notebook.read()
    notebook.code_cells(changed)[0]["source"].append("\n")
    assert notebook.digest(changed) != notebook.digest(notebook.read())
