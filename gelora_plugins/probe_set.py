"""The documents that are measured on: a seeded sample of the training rows, and padded batches made of it."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ProbeError

ROWS_PER_DOCUMENT = 10  # rows read at most for each document wanted: bounds the search where most rows repeat
_NOT_TEXT = {"pixel_values", "input_features", "input_values", "inputs_embeds"}
IGNORED_LABEL = -100  # torch.nn.CrossEntropyLoss's ignore_index, which every framework here pads labels with

SEQUENCES_IN_A_ROW = (
    "GeLoRA measures one sequence a row, and multiple choice has several. Choose the ranks before training, from a row "
    "for each sequence: plan = select_ranks(model, [{'input_ids': ids} for row in rows for ids in row['input_ids']], "
    "lora_config=config); plan.save('plan.json'); then train with GeLoRACallback(plan='plan.json')."
)

Batch = dict[str, Tensor]
Collator = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class ProbeSet:
    """What goes through the model.

    Attributes:
        documents: in the order of choice, which is random: tuples of token ids, or rows for a collator.
        num_repeats: inputs left out because the same input was already chosen.
        to_batch: makes a batch on the CPU of some of `documents`.
        length: tokens of a document, or 0 where they are not known.
    """

    documents: Sequence[Any]
    num_repeats: int
    to_batch: Callable[[Sequence[Any]], Batch]
    length: Callable[[Any], int]

    @property
    def num_documents(self) -> int:
        """How many documents were chosen."""
        return len(self.documents)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of the documents from `start` to `stop`, longest first: the largest batch fails first."""
        ordered = sorted(self.documents[start:stop], key=self.length, reverse=True)
        for i in range(0, len(ordered), batch_size):
            yield self.to_batch(ordered[i : i + batch_size])

    def fingerprint(self, count: int | None = None) -> str:
        """SHA-256 over the first `count` documents in the order of choice: token ids, or rows where there are none."""
        digest = hashlib.sha256()
        for document in self.documents[:count]:
            _digest(document, digest.update)
        return digest.hexdigest()


NO_DOCUMENTS = ProbeSet((), 0, lambda some: {}, lambda document: 0)  # where another process has them


def choose_documents(dataset: Any, config: GeLoRAConfig, model_config: Any, collator: Collator | None) -> ProbeSet:
    """A seeded sample without replacement of `config.probe_samples` distinct documents.

    Rows with `input_ids` become batches of our own: padding stripped, packed documents taken apart, sorted by
    length. Other rows go through `collator`.

    Args:
        dataset: a map-style or iterable dataset, or a list, of rows.
        model_config: configuration of the model; says whether it is an encoder-decoder and how it pads.
        collator: makes a batch of rows that have no `input_ids`.

    Raises:
        ProbeError: no dataset, no rows, or rows that are no token ids without a collator that takes them.
    """
    rows = _sample_rows(dataset, config)
    first = next(rows, None)
    if first is None:
        raise ProbeError("The training dataset is empty; expected rows to measure on.")
    if not _is_tokenised(first):
        return _collated(first, rows, config, collator)
    seq2seq = bool(getattr(model_config, "is_encoder_decoder", False))
    chosen: dict[tuple[tuple[int, ...], ...], None] = {}
    num_repeats = 0
    for row in (r for source in ([first], rows) for r in source):
        for document in _documents(row, config.probe_max_length, seq2seq):
            if document in chosen:
                num_repeats += 1
            else:
                chosen[document] = None
        if len(chosen) >= config.probe_samples:
            break
    documents = list(chosen)[: config.probe_samples]
    fields = ("input_ids", "labels") if seq2seq else ("input_ids", "token_type_ids")
    pad = max(getattr(model_config, "pad_token_id", None) or 0, 0)  # old Llama configurations say -1
    return ProbeSet(documents, num_repeats, lambda some: _pad(some, fields, pad), lambda document: len(document[0]))


def _sample_rows(dataset: Any, config: GeLoRAConfig) -> Iterator[Any]:
    if dataset is None:
        raise ProbeError("There is no training dataset; GeLoRA measures on it, so pass `train_dataset`.")
    rng = random.Random(config.probe_seed)
    most = ROWS_PER_DOCUMENT * config.probe_samples
    streamed = isinstance(dataset, IterableDataset)  # inherits a __getitem__ that raises
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and not streamed:
        for i in rng.sample(range(len(dataset)), min(len(dataset), most)):
            yield dataset[i]
    else:
        rows = [row for row, _ in zip(dataset, range(most), strict=False)]
        rng.shuffle(rows)
        yield from rows


def _is_tokenised(row: Any) -> bool:
    return isinstance(row, Mapping) and "input_ids" in row and not _NOT_TEXT & set(row)


def _documents(row: Mapping[str, Any], max_length: int, seq2seq: bool) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The documents of one row, each as its fields: token ids, then labels or token types (may be empty)."""
    ids = _ints(row, "input_ids")
    mask = _ints(row, "attention_mask") or [1] * len(ids)
    if seq2seq:
        # A class, or no label: what the decoder reads, if anything, is the model's to know.
        classifies = not hasattr(row.get("labels"), "__len__") or getattr(row["labels"], "shape", None) == ()
        labels = [] if classifies else [label for label in _ints(row, "labels") if label != IGNORED_LABEL]
        if not (labels or classifies):
            raise ProbeError(
                f"A row has the fields {', '.join(row)}; expected labels with at least one token, because the "
                "decoder of an encoder-decoder model reads them."
            )
        real = [token for token, kept in zip(ids, mask, strict=True) if kept]
        yield tuple(real[:max_length]), tuple(labels[:max_length])
        return
    types = _ints(row, "token_type_ids")
    start = 0
    for length in _lengths(row, len(ids)):
        places = [i for i in range(start, start + length) if mask[i]][:max_length]
        start += length
        if places:
            yield tuple(ids[i] for i in places), tuple(types[i] for i in places) if any(types) else ()


def _lengths(row: Mapping[str, Any], total: int) -> list[int]:
    """The lengths of the documents of a row: TRL's packed rows say them, others count positions from 0 again."""
    lengths = _ints(row, "seq_lengths")
    if lengths or "position_ids" not in row:
        return lengths or [total]
    starts = [i for i, position in enumerate(_ints(row, "position_ids")) if position == 0]
    if starts[:1] != [0]:
        return [total]
    return [stop - start for start, stop in zip(starts, [*starts[1:], total], strict=True)]


def _ints(row: Mapping[str, Any], name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        return []
    try:
        return [operator.index(entry) for entry in (value.tolist() if hasattr(value, "tolist") else value)]
    except TypeError as error:
        nested = isinstance(value, (list, tuple)) and isinstance(value[0], (list, tuple))
        raise ProbeError(
            f"{name} of a row is {value!r:.80}; expected a list of whole numbers."
            + (f" {SEQUENCES_IN_A_ROW}" if nested else "")
        ) from error


def _pad(documents: Sequence[tuple[tuple[int, ...], ...]], fields: Sequence[str], pad: int) -> Batch:
    """Right-padded batch; `decoder_attention_mask` stands for the labels, which the model shifts itself."""
    batch: Batch = {}
    for position, name in enumerate(fields):
        columns = [document[position] for document in documents]
        if not any(columns):
            continue
        width = max(len(document[position] or document[0]) for document in documents)
        mask = torch.tensor([[1] * len(c) + [0] * (width - len(c)) for c in columns])
        fill = {"input_ids": pad, "labels": IGNORED_LABEL}.get(name, 0)
        batch[name] = torch.tensor([list(c) + [fill] * (width - len(c)) for c in columns])
        if name == "input_ids":
            batch["attention_mask"] = mask
        elif name == "labels":
            batch["decoder_attention_mask"] = mask
    return batch


def _collated(first: Any, rest: Iterator[Any], config: GeLoRAConfig, collator: Collator | None) -> ProbeSet:
    shape = f"the fields {', '.join(map(str, first))}" if isinstance(first, Mapping) else f"a {type(first).__name__}"
    if collator is None:
        raise ProbeError(f"A row is {shape}; expected `input_ids`, or a collator that makes a batch of such rows.")
    rows = [first, *(row for row, _ in zip(rest, range(config.probe_samples - 1), strict=False))]

    def to_batch(some: Sequence[Any]) -> Batch:
        try:
            batch = collator(list(some))
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
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    return ProbeSet(rows, 0, to_batch, lambda row: 0)


def _digest(value: Any, update: Callable[[bytes], None]) -> None:
    """Everything in `value`: the repr of a large tensor leaves entries out, that of an image holds its address."""
    if isinstance(value, Mapping):
        _digest(list(value.items()), update)
    elif isinstance(value, (list, tuple)) and not all(type(entry) is int for entry in value):
        update(f"{len(value)} ".encode())
        for entry in value:
            _digest(entry, update)
    elif isinstance(value, Tensor):
        _digest(value.detach().cpu().double().numpy(), update)
    elif hasattr(value, "tobytes"):
        update(value.tobytes())
    else:
        update(repr(value).encode())
