"""Rows of every kind that models take, and which formats of them are measured.

`formats_read()` is the table of formats for the README.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from tests.support.tiny import VOCABULARY, build

Rows = list[dict[str, Any]]
COUNT = 52  # rows; 50 distinct documents are the least that is measured


def ids(length: int, rng: random.Random) -> list[int]:
    return [rng.randrange(5, VOCABULARY) for _ in range(length)]


def rows(make: Callable[[random.Random, int], dict[str, Any]]) -> Callable[[], Rows]:
    """`COUNT` rows of `make(generator, number)`, the same each time."""

    def all_rows() -> Rows:
        rng = random.Random(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [make(rng, i) for i in range(COUNT)]

    return all_rows


def labelled(rng: random.Random, i: int) -> dict[str, Any]:
    return {"input_ids": [*ids(8, rng), 2], "attention_mask": [1] * 9, "labels": i % 2}  # BART's classifier reads </s>


def continued(rng: random.Random, i: int, before: Sequence[int] = ()) -> dict[str, Any]:
    document = [*before, *ids(8, rng)]
    return {"input_ids": document, "attention_mask": [1] * len(document), "labels": document}


def image(side: int) -> Callable[[], Rows]:
    return rows(lambda rng, i: {"pixel_values": torch.randn(3, side, side), "labels": i % 2})


def spectrogram(*shape: int, **labels: Any) -> Callable[[], Rows]:
    return rows(lambda rng, i: {"input_features": torch.randn(*shape), "labels": torch.tensor(ids(5, rng)), **labels})


def padded_waves(some: Rows) -> dict[str, torch.Tensor]:
    """What a speech collator makes: samples padded to the longest, and a mask of them."""
    waves = [torch.tensor(row["input_values"]) for row in some]
    longest = max(map(len, waves))
    return {
        "input_values": torch.stack([pad(wave, (0, longest - len(wave))) for wave in waves]),
        "attention_mask": torch.stack([pad(torch.ones_like(wave), (0, longest - len(wave))).long() for wave in waves]),
        "labels": torch.stack([torch.as_tensor(row["labels"]) for row in some]),
    }


def wave(labels: Callable[[random.Random], Any]) -> Callable[[], Rows]:
    return rows(lambda rng, i: {"input_values": torch.randn(rng.choice([400, 640])).tolist(), "labels": labels(rng)})


LABELLED, CONTINUED = rows(labelled), rows(continued)
PAIRS = rows(lambda rng, i: {"input_ids": ids(8, rng), "attention_mask": [1] * 8, "labels": ids(6, rng)})
CHOICES = rows(lambda rng, i: {"input_ids": [ids(6, rng), ids(6, rng)], "labels": i % 2})
ANSWERS = rows(lambda rng, i: {"input_ids": ids(8, rng), "start_positions": 1, "end_positions": 2})
PLAN_BEFORE = "make the plan before, of one row for each sequence, and pass `plan=`"


@dataclass(frozen=True)
class Format:
    """Rows of one kind, on Llama or BERT with a head.

    Attributes:
        rows: makes the training data.
        documents: how many are measured; 0 where the rows are refused.
        refused, note: as of a `Family`.
        model, collator: as of a `Family`.
    """

    rows: Callable[[], Any]
    documents: int = 0
    refused: str = ""
    note: str = ""
    model: Callable[[], Any] = lambda: build("llama")
    collator: Callable[[Rows], Any] | None = None


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(CONTINUED())


def padded(rng: random.Random, i: int) -> dict[str, Any]:
    length = rng.randint(4, 8)
    document = [*ids(length, rng), *[0] * (8 - length)]
    return {"input_ids": document, "attention_mask": [1] * length + [0] * (8 - length), "labels": document}


def packed(rng: random.Random, i: int) -> dict[str, Any]:
    return {**continued(rng, i), "position_ids": [0, 1, 2, 0, 1, 2, 3, 4]}


def typed(rng: random.Random, i: int) -> dict[str, Any]:
    return {**labelled(rng, i), "token_type_ids": [0] * 4 + [1] * 5}


def tokenising(some: Rows) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[ord(letter) - 92 for letter in row["text"]] for row in some])
    return {"input_ids": tokens, "labels": tokens}


TEXTS = rows(lambda rng, i: {"text": "".join(rng.choices("abcdefghij", k=8))})
FORMATS: dict[str, Format] = {
    "token ids": Format(CONTINUED, COUNT),
    "token ids, padded": Format(rows(padded), COUNT, note="padding is left out"),
    "token ids, packed": Format(rows(packed), 2 * COUNT, note="`position_ids` or `seq_lengths` tell documents apart"),
    "pairs with `token_type_ids`": Format(rows(typed), COUNT, model=lambda: build("bert")),
    "a stream": Format(Stream, COUNT),
    "text, and a collator that tokenises it": Format(TEXTS, COUNT, collator=tokenising),
    "text alone": Format(
        TEXTS, refused="no tensors; expected inputs that LlamaModel takes", note="tokenise it, or pass such a collator"
    ),
    "several sequences in a row": Format(CHOICES, refused="a row for each sequence", note=PLAN_BEFORE),
    "the same few rows again and again": Format(
        lambda: CONTINUED()[:10] * 10, refused="10 distinct documents", note="50 are the least that is measured"
    ),
}


def formats_read() -> str:
    """The table of rows for the README."""
    lines = ["| rows | measured | |", "| --- | --- | --- |"]
    for name, kind in FORMATS.items():
        lines.append(f"| {name} | {'yes' if kind.documents else 'refused'} | {kind.note} |")
    return "\n".join(lines)
