"""Rows for the command line: a dataset from a file or the hub, tokenised in the usual ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def are_for_trl(names: Sequence[str], text_field: str | None, installed: bool) -> bool:
    """Whether TRL's trainers tokenise rows with these fields: chats, prompts, pairs, instructions, or `text_field`.

    Raises:
        ProbeError: they do, they alone, and TRL is not installed.
    """
    known = {"messages", "conversations", "prompt", "chosen", "completions"} & {*names}
    if "input_ids" in names or not (known or {"instruction", "output"} <= {*names}):
        return installed and "input_ids" not in names and text_field in names
    if not installed:
        raise ProbeError(
            f"The rows have the fields {', '.join(names)}, which TRL's trainers tokenise, and trl is not installed: "
            "pip install 'gelora[trl]', or give rows with input_ids or text."
        )
    return True


class TokenisedRows:
    """A map-style view of `dataset` whose rows have `input_ids`; each row is tokenised when it is read.

    A row is taken as it is when it has `input_ids`; else `text_a` and `text_b` make a pair, and `text`, or the field
    named, is read as text.
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
        if self.text_field in row:
            return dict(self.tokenizer(row[self.text_field]))
        if "text_a" in row and "text_b" in row:
            return dict(self.tokenizer(row["text_a"], row["text_b"]))
        raise ProbeError(
            f"A row has the fields {', '.join(row)}; expected input_ids, messages, conversations, prompt, prompt and "
            "completion, chosen and rejected, instruction and output, text_a and text_b, or "
            f"{self.text_field!r} (--text-field names another)."
        )
