"""The files of `gelora compare`: what cannot be used is named, with file and row."""

import json
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins.compare.task import load_task
from gelora_plugins.errors import ProbeError

GOOD: dict[str, dict[str, Any]] = {
    "classification": {"text": "a", "label": 1},
    "regression": {"text": "a", "label": 0.5},
    "causal-lm": {"prompt": "a", "completion": "b"},
}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("classification", {"text": None, "label": 1}, "text is None; expected text"),
        ("classification", {"text": 3, "label": 1}, "text is 3; expected text"),
        ("classification", {"text": "a", "label": None}, "label is None; expected a whole number or text"),
        ("classification", {"text": "a", "label": [1]}, r"label is \[1\]; expected a whole number or text"),
        ("regression", {"text": "a", "label": None}, "label is None; expected a finite number"),
        ("regression", {"text": "a", "label": "b"}, "label is 'b'; expected a finite number"),
        ("regression", {"text": "a", "label": []}, r"label is \[\]; expected a finite number"),
        ("causal-lm", {"prompt": "a", "completion": None}, "completion is None; expected text"),
        ("causal-lm", {"prompt": None, "completion": "b"}, "prompt is None; expected text"),
    ],
)
@pytest.mark.parametrize("of", ["train", "test"])
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, kind: str, row: dict[str, Any], said: str, of: str) -> None:
    good = write(tmp_path / "good.jsonl", *[GOOD[kind]] * 20)
    bad = write(tmp_path / "bad.jsonl", *[GOOD[kind]] * 20, row)
    data, test = (bad, None) if of == "train" else (good, bad)
    with pytest.raises(ProbeError, match=rf"^Row 21 of {bad}: {said}"):
        load_task("task", kind, data, test)


@pytest.mark.parametrize("kind", GOOD)
def test_rows_without_the_fields_are_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "words.jsonl", *[{"words": "a", "label": 1}] * 20)
    with pytest.raises(ProbeError, match=rf"^Row 1 of {path}: it has the fields words, label; expected text"):
        load_task("task", kind, path)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_rows_without_a_label_are_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "words.jsonl", *[{"text": "a"}] * 20)
    with pytest.raises(ProbeError, match=rf"^Row 1 of {path}: label is None; expected"):
        load_task("task", kind, path)


def test_a_row_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "größer", "label": 1}\n'.encode("latin-1") * 20)
    with pytest.raises(ProbeError, match=rf"^Row 1 of {path}: UnicodeDecodeError: 'utf-8' codec"):
        load_task("task", "classification", str(path))


@pytest.mark.parametrize("kind", GOOD)
def test_good_rows_are_kept(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "good.jsonl", *[GOOD[kind]] * 20)
    task = load_task("task", kind, path)
    assert [*task.train, *task.test] == [GOOD[kind]] * 20


@pytest.mark.parametrize("of", ["train", "test"])
def test_labels_of_two_kinds_are_refused(tmp_path: Path, of: str) -> None:
    words = {"text": "a", "label": "b"}
    mixed = write(tmp_path / "mixed.jsonl", *[GOOD["classification"]] * 20, *([words] * 20 if of == "train" else ()))
    test = None if of == "train" else write(tmp_path / "words.jsonl", *[words] * 20)
    with pytest.raises(ProbeError, match=rf"The labels of {mixed}.* are int and str; expected one"):
        load_task("task", "classification", mixed, test)
