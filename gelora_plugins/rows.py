"""Rows for the command line: a dataset from a file or the hub, tokenised in the usual ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gelora_plugins.errors import ProbeError

_FORMATS = {".jsonl": "json", ".json": "json", ".gz": "json", ".parquet": "parquet", ".csv": "csv"}


def load_rows(data: str, split: str) -> Any:
    """A `datasets.Dataset` from a JSONL, Parquet or CSV file (gzipped JSONL too), or from the hub by its id.

    Raises:
        ProbeError: the file has another format, or nothing is found.
    """
    import datasets

    path = Path(data)
    if path.is_file():
        kind = _FORMATS.get(path.suffix)
        if kind is None:
            raise ProbeError(f"{data} ends in {path.suffix!r}; expected one of: {', '.join(_FORMATS)}.")
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    try:
        return datasets.load_dataset(data, split=split)
    except (OSError, ValueError) as error:
        raise ProbeError(f"{data} is no file here and no dataset that can be loaded: {error}") from error


class TokenisedRows:
    """A map-style view of `dataset` whose rows have `input_ids`; each row is tokenised when it is read.

    A row is taken as it is when it has `input_ids`; else its `messages` go through the chat template, `prompt` and
    `completion` are joined, `text_a` and `text_b` make a pair, and `text`, or the field named, is read as text.
    """

    def __init__(self, dataset: Any, tokenizer: Any, text_field: str = "text") -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.text_field = text_field

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The tokenised row. Raises ProbeError when it has none of the known fields."""
        row: dict[str, Any] = self.dataset[i]
        if "input_ids" in row:
            return row
        encode: Callable[..., Any] = self.tokenizer
        if self.text_field in row:
            return dict(encode(row[self.text_field]))
        if "messages" in row:
            return dict(encode(self.tokenizer.apply_chat_template(row["messages"], tokenize=False)))
        if "prompt" in row and "completion" in row:
            return dict(encode(row["prompt"] + row["completion"]))
        if "text_a" in row and "text_b" in row:
            return dict(encode(row["text_a"], row["text_b"]))
        raise ProbeError(
            f"A row has the fields {', '.join(row)}; expected input_ids, messages, prompt and completion, text_a and "
            f"text_b, or {self.text_field!r} (--text-field names another)."
        )
