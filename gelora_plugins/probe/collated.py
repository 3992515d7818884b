"""Rows that only a collator can read: kept small until they are measured, and the batches that it makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gelora_plugins.errors import ProbeError

NOT_TEXT = {"pixel_values", "input_features", "input_values", "inputs_embeds"}  # names that transformers gives


def batch_maker(
    collator: Callable[[list[Any]], Any], example: Any, max_length: int, accepted: Container[str], seq2seq: bool
) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """A function that makes a batch of some rows from `compact`: the tensors that `collator` makes of them.

    Args:
        example: a row; errors say what it looks like.
        max_length: tokens of a document that are read.
        accepted: names of the inputs that the backbone takes, which may not get lost.
        seq2seq: whether the batch has inputs of a decoder as well.
    """
    shape = describe(example)

    def to_batch(some: Sequence[Any]) -> dict[str, Tensor]:
        try:
            batch = collator([expand(row) for row in some])
        except Exception as error:
            raise ProbeError(
                f"The data collator failed on rows with {shape}: {type(error).__name__}: {error}. "
                "GeLoRA measures before training, so the rows must be ones that the collator takes."
            ) from error
        if not isinstance(batch, Mapping):
            raise ProbeError(
                f"The data collator made a {type(batch).__name__} of rows with {shape}; expected a mapping of "
                "tensors. Give rows with `input_ids`."
            )
        tensors: dict[str, Tensor] = {}
        for name, value in batch.items():
            if isinstance(value, (Tensor, np.ndarray)):
                tensors[name] = torch.as_tensor(value)
            elif name in accepted and isinstance(value, (list, tuple, Mapping)):
                raise ProbeError(
                    f"The data collator made a {type(value).__name__} for {name}, which the model reads; expected a "
                    "tensor. Give a collator that makes tensors, or a plan that was made before: plan='plan.json'."
                )
        return _cut(_preferred(tensors), max_length, seq2seq)

    return to_batch


def describe(row: Any) -> str:
    """What a row looks like, for an error."""
    return f"the fields {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"


def _preferred(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The chosen half of a batch of pairs, as the collators of ORPO, CPO and SimPO make them (trl 1.9 to 1.16)."""
    if "input_ids" in batch or "chosen_input_ids" not in batch:
        return batch
    return {name.removeprefix("chosen_"): batch[name] for name in batch if name.startswith("chosen_")}


def _cut(batch: dict[str, Tensor], max_length: int, seq2seq: bool) -> dict[str, Tensor]:
    """`batch` with at most `max_length` real tokens of each document, the padding on the right.

    One that holds more than text stays whole, because its tokens keep places for what is beside them.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2:
        return batch
    decoder = {name for name in batch if seq2seq and (name == "labels" or name.startswith("decoder_"))}
    tokens = {name for name, value in batch.items() if value.shape[:2] == ids.shape} - decoder
    others = {name for name, value in batch.items() if value.shape != ids.shape[:1]} - decoder - tokens
    if others or batch.keys() & NOT_TEXT:
        return batch
    cut = {name: batch[name][:, :max_length] for name in decoder}
    if ids.shape[1] > max_length:
        mask = batch.get("attention_mask", torch.ones_like(ids))
        places = (mask == 0).int().argsort(dim=1, stable=True)[:, :max_length]
        cut |= {name: batch[name][torch.arange(len(ids))[:, None], places] for name in tokens}
    return {**batch, **cut}


# Python's floats take eight times the room of float32, and a row of a sound or a picture may be lists of them.


@dataclass(frozen=True)
class _Numbers:
    """A list of numbers, or of lists of equal lengths; `array` has their values exactly."""

    array: np.ndarray[Any, Any]


def compact(row: Any) -> Any:
    """`row` with its lists of numbers in arrays; `expand` gives it back."""
    if type(row) is dict:
        return {name: compact(value) for name, value in row.items()}
    if type(row) is not list or not row or not isinstance(row[0], (int, float, list)):
        return row
    try:
        array = np.asarray(row)
    except (ValueError, OverflowError):  # lists of unequal lengths, integers beyond 64 bits
        return row
    if not array.size or array.dtype.kind not in "bif" or type(array.flat[0].item()) is not type(_first_number(row)):
        return row
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            small = array.astype(np.float32)
        array = small if np.array_equal(small, array, equal_nan=True) else array
    return _Numbers(array)


def _first_number(row: Any) -> Any:
    return _first_number(row[0]) if isinstance(row, list) else row


def expand(row: Any) -> Any:
    """What `compact` was given."""
    if type(row) is dict:
        return {name: expand(value) for name, value in row.items()}
    return row.array.tolist() if isinstance(row, _Numbers) else row


def fingerprint(documents: Sequence[Any]) -> str:
    """SHA-256 over everything in `documents`: tuples of token ids, or rows from `compact`."""
    digest = hashlib.sha256()
    for document in documents:
        _digest(document, digest.update)
    return digest.hexdigest()


def _digest(value: Any, update: Callable[[bytes], None]) -> None:
    """The repr of a large tensor leaves entries out, that of an image holds its address."""
    if isinstance(value, Mapping):
        _digest(list(value.items()), update)
    elif isinstance(value, (list, tuple)) and not all(type(entry) is int for entry in value):
        update(f"{len(value)} ".encode())
        for entry in value:
            _digest(entry, update)
    elif isinstance(value, _Numbers):
        update(f"{value.array.shape} ".encode())
        update(value.array.tobytes())
    elif isinstance(value, Tensor):
        _digest(value.detach().cpu().double().numpy(), update)
    elif hasattr(value, "tobytes"):
        update(value.tobytes())
    else:
        update(repr(value).encode())
