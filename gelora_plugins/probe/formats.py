"""Rows of text: a dataset from a file or the hub, tokenised in the usual ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gelora_plugins.errors import ProbeError
from gelora_plugins.mistakes import reason

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def format_of(path: Path) -> str | None:
    """What `datasets` calls the format of a file, by its ending; None for another file."""
    return FORMATS.get(Path(path.name.removesuffix(".gz")).suffix)


def check_place(data: str) -> None:
    """Raises ProbeError where `data` can only be a file and is none. Takes no time: no library is loaded, no hub asked.

    What ends as a file does is an id on the hub only in the form OWNER/NAME, where no folder OWNER is here.
    """
    path = Path(data)
    if format_of(path) and not path.exists() and (len(path.parts) != 2 or data[0] == "." or path.parent.is_dir()):
        raise ProbeError(f"{data} is no file here and no dataset on the hub. Mend the path.")


def load_rows(data: str, split: str) -> Any:
    """A `datasets.Dataset` from a JSONL, Parquet or CSV file (gzipped too), or from the hub by its id.

    Raises:
        ProbeError: the file is empty, broken or has another format, or nothing is found.
    """
    check_place(data)
    import datasets

    path = Path(data)
    if not path.is_file():
        try:
            return datasets.load_dataset(data, split=split)
        except Exception as error:  # whatever a folder of files, or the hub, makes of it
            raise ProbeError(f"{data} is no file here and no dataset that can be loaded: {reason(error)}") from error
    kind = format_of(path)
    if kind is None:
        raise ProbeError(f"{data} ends in {path.suffix!r}; expected one of: {', '.join(FORMATS)}, or one with .gz.")
    if not path.stat().st_size:
        raise ProbeError(f"{data} is empty; expected rows.")
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # pyarrow, pandas, gzip and datasets have kinds of their own
        raise ProbeError(f"{data} cannot be read as {kind}: {reason(error)}") from error


@contextmanager
def row_of(data: str, number: int) -> Iterator[None]:
    """Whatever a row makes fail is a ProbeError that names the file and the row, counted from 1."""
    try:
        yield
    except Exception as error:  # tokenizers and chat templates raise what they like
        raise ProbeError(f"Row {number} of {data}: {reason(error)}") from error


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


def check_fields(names: Sequence[str], text_field: str, data: str) -> None:
    """Raises ProbeError where rows with these fields, of `data`, can be read in no way."""
    known = {"input_ids", "messages", "conversations", "prompt", "chosen", "completions", text_field} & {*names}
    if not (known or {"instruction", "output"} <= {*names} or {"text_a", "text_b"} <= {*names}):
        raise ProbeError(f"{data}: {_no_field(names, text_field)}")


def _no_field(names: Iterable[str], text_field: str) -> str:
    return (
        f"it has the fields {', '.join(names)}; expected input_ids, messages, conversations, prompt, prompt and "
        "completion, chosen and rejected, instruction and output, text_a and text_b, or "
        f"{text_field!r} (text_field, or --text-field, names another)."
    )


class TokenisedRows:
    """A map-style view of `dataset` whose rows have `input_ids`; each row is tokenised when it is read.

    A row is taken as it is when it has `input_ids`; else `text_a` and `text_b` make a pair, and `text`, or the field
    named, is read as text. `data` is the name of the dataset, for messages.
    """

    def __init__(self, dataset: Any, tokenizer: Any, text_field: str = "text", data: str = "the data") -> None:
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.data = data

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """The tokenised row. Raises ProbeError, with file and row, when it cannot be read or has no known fields."""
        with row_of(self.data, i + 1):
            return self._tokenised(self.dataset[i])

    def _tokenised(self, row: dict[str, Any]) -> dict[str, Any]:
        if "input_ids" in row:
            if row["input_ids"] is None:
                raise ProbeError("input_ids is None; expected a list of whole numbers. Mend the row, or leave it out.")
            return row
        if self.text_field in row:
            return dict(self.tokenizer(text_of(row, self.text_field)))
        if "text_a" in row and "text_b" in row:
            return dict(self.tokenizer(text_of(row, "text_a"), text_of(row, "text_b")))
        raise ProbeError(_no_field(row, self.text_field))


def text_of(row: Mapping[str, Any], field: str) -> str:
    """The text in a field of a row. Raises ProbeError for null, a number or anything else."""
    value = row[field]
    if not isinstance(value, str):
        raise ProbeError(f"{field} is {value!r:.80}; expected text. Mend the row, or leave it out.")
    return value
