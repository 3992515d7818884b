"""The documents that are measured on: a seeded sample of the training rows, and padded batches made of it."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ProbeError
from gelora_plugins.probe.collated import NOT_TEXT, batch_maker, compact, describe, fingerprint

ROWS_PER_DOCUMENT = 10  # rows read at most for each document wanted: bounds the search where most rows repeat
MEDIA = {"image", "images", "video", "videos", "audio", "audios"}  # files that a collator opens
_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "seq_lengths", "labels"}
_BESIDE_TOKENS = {  # columns of tokenisers, TRL and Axolotl that no backbone reads
    "label",
    "label_ids",
    "length",
    "special_tokens_mask",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "completion_mask",
    "assistant_masks",
}
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
        num_rows: of the data set; None where it has no length.
        num_targets: tokens of all rows that have a label, or rows where each has one label, as the rows that were read
            let expect; None where those do not say.
    """

    documents: Sequence[Any]
    num_repeats: int
    to_batch: Callable[[Sequence[Any]], Batch]
    length: Callable[[Any], int]
    num_rows: int | None = None
    num_targets: int | None = None

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
        return fingerprint(self.documents[:count])


NO_DOCUMENTS = ProbeSet((), 0, lambda some: {}, lambda document: 0)  # where another process has them


def choose_documents(
    dataset: Any, config: GeLoRAConfig, model_config: Any, collator: Collator | None, accepted: Container[str] = ()
) -> ProbeSet:
    """A seeded sample without replacement of `config.probe_samples` distinct documents.

    Rows of token ids and nothing else that matters become batches of our own: padding stripped, packed documents
    taken apart, sorted by length. All others go through `collator`.

    Args:
        dataset: a map-style or iterable dataset, or a list, of rows. Of a stream, the first rows are read, and no more
            than are needed; a bare iterator lacks them afterwards.
        model_config: configuration of the model; says whether it is an encoder-decoder and how it pads.
        collator: makes a batch of rows.
        accepted: names of the inputs that the backbone takes.

    Raises:
        ProbeError: no dataset, no rows, a stream that would lose them, or rows that are no token ids without a collator
            that takes them.
    """
    rows = _sample_rows(dataset, config)
    num_rows = None if _is_stream(dataset) else len(dataset)
    first = next(rows, None)
    if first is None:
        raise ProbeError("The training dataset is empty; expected rows to measure on.")
    # A stream has an order of its own, and the first documents of a probe set are to be like the rest.
    order = random.Random(config.probe_seed).shuffle if _is_stream(dataset) else lambda documents: None
    seq2seq = bool(getattr(model_config, "is_encoder_decoder", False))
    beside = _beside_tokens(first, collator, accepted)
    if beside is None or (beside and collator is not None):
        if collator is None:
            raise ProbeError(
                f"A row is {describe(first)}; expected `input_ids`, or a collator that makes a batch of such rows."
            )
        some = [compact(row) for source in ([first], islice(rows, config.probe_samples - 1)) for row in source]
        order(some)
        to_batch = batch_maker(collator, first, config.probe_max_length, accepted, seq2seq)
        return ProbeSet(some, 0, to_batch, lambda row: 0, num_rows)
    chosen: dict[tuple[tuple[int, ...], ...], None] = {}
    num_repeats = 0
    targets: list[int | None] = []  # of the rows that are read
    for row in (r for source in ([first], rows) for r in source):
        beside = _beside_tokens(row, collator, accepted)
        if beside is None or beside:
            more = ", ".join(sorted(beside)) if beside else "input_ids is not all there is, or is missing"
            raise ProbeError(
                f"A row is {describe(row)}; expected token ids alone ({more}). Pass the collator that makes the "
                "batches, with the same columns in every row, or leave these columns out."
            )
        for document in _documents(row, config.probe_max_length, seq2seq):
            if document in chosen:
                num_repeats += 1
            else:
                chosen[document] = None
        targets.append(_num_targets(row))
        if len(chosen) >= config.probe_samples:
            break
    documents = list(chosen)[: config.probe_samples]
    order(documents)
    fields = ("input_ids", "labels") if seq2seq else ("input_ids", "token_type_ids")
    pad = max(getattr(model_config, "pad_token_id", None) or 0, 0)  # old Llama configurations say -1
    known = [count for count in targets if count is not None]
    num_targets = None
    if num_rows is not None and len(known) == len(targets):
        num_targets = round(sum(known) / len(known) * num_rows)
    to_batch = partial(_pad, fields=fields, pad=pad)
    return ProbeSet(documents, num_repeats, to_batch, lambda document: len(document[0]), num_rows, num_targets)


def _sample_rows(dataset: Any, config: GeLoRAConfig) -> Iterator[Any]:
    if dataset is None:
        raise ProbeError("There is no training dataset; GeLoRA measures on it, so pass `train_dataset`.")
    most = ROWS_PER_DOCUMENT * config.probe_samples
    if _is_stream(dataset):
        yield from islice(_read_again(dataset), most)
        return
    indices = random.Random(config.probe_seed).sample(range(len(dataset)), min(len(dataset), most))
    # A dataset that prepares its rows may do so for many at once.
    yield from dataset.rows_at(indices) if hasattr(dataset, "rows_at") else (dataset[i] for i in indices)


def _is_stream(dataset: Any) -> bool:
    map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return not map_style or isinstance(dataset, IterableDataset)  # which inherits a __getitem__ that raises


def _read_again(dataset: Any) -> Iterator[Any]:
    """An iterator over a stream; a bare one, which is no dataset, is read where it stands.

    Raises:
        ProbeError: the stream cannot be read again from its start.
    """
    bare = hasattr(dataset, "__next__") and not isinstance(dataset, IterableDataset)
    rows: Iterator[Any] = iter(dataset)
    if not bare and rows is iter(dataset):
        raise ProbeError(
            f"The training dataset can be read once: each iter() of the {type(dataset).__name__} gives the same "
            "iterator, so the rows that are measured would be missing from training. Give a dataset whose __iter__ "
            "starts again, or make a plan before, from other rows: select_ranks(model, rows).save('plan.json'), then "
            "plan='plan.json'."
        )
    return rows


def _beside_tokens(row: Any, collator: Collator | None, accepted: Container[str]) -> set[str] | None:
    """The columns beside the token ids of a row that may matter to what is trained on; None where there are no ids."""
    if not isinstance(row, Mapping) or "input_ids" not in row or row.keys() & NOT_TEXT:
        return None
    others = {str(name) for name in row} - _TOKENS - _BESIDE_TOKENS
    if collator is None:  # nobody opens files, and the model reads what it has a name for
        return {name for name in others if row[name] is not None and (name in MEDIA or name in accepted)}
    seen = getattr(collator, "signature_columns", None)  # of transformers' RemoveColumnsCollator, as the Trainer's is
    return others if seen is None else others & set(seen)


def _documents(row: Mapping[str, Any], max_length: int, seq2seq: bool) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The documents of one row, each as its fields: token ids, then labels or token types (may be empty)."""
    ids = _ints(row, "input_ids")
    mask = _each(row, "attention_mask", ids) or [1] * len(ids)
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
    types = _each(row, "token_type_ids", ids)
    start = 0
    for length in _lengths(row, ids):
        places = [i for i in range(start, start + length) if mask[i]][:max_length]
        start += length
        if places:
            yield tuple(ids[i] for i in places), tuple(types[i] for i in places) if any(types) else ()


def _num_targets(row: Mapping[str, Any]) -> int | None:
    """Tokens of a row that have a label: by its labels, or TRL's masks; all of them where it has neither.

    None where the labels are no numbers in rows and columns. What they are is the model's to know, and no reason not to
    measure.
    """
    labels = next((row[name] for name in ("labels", "label") if row.get(name) is not None), None)
    if isinstance(labels, str):
        return 1
    if labels is not None:
        try:
            return int((torch.as_tensor(labels) != IGNORED_LABEL).sum())
        except (TypeError, ValueError):
            return None
    masks = [_each(row, name, row["input_ids"]) for name in ("completion_mask", "assistant_masks")]
    masks = [mask for mask in (*masks, _ints(row, "attention_mask")) if mask]
    return sum(map(all, zip(*masks, strict=True))) if masks else len(row["input_ids"])


def _lengths(row: Mapping[str, Any], ids: list[int]) -> list[int]:
    """The lengths of the documents of a row: TRL's packed rows say them, others count positions from 0 again."""
    lengths, total = _ints(row, "seq_lengths"), len(ids)
    if lengths and sum(lengths) != total:
        raise ProbeError(f"A row has {total} input_ids and seq_lengths of {sum(lengths)}; expected the same.")
    if lengths or "position_ids" not in row:
        return lengths or [total]
    starts = [i for i, position in enumerate(_each(row, "position_ids", ids)) if position == 0]
    if starts[:1] != [0]:
        return [total]
    return [stop - start for start, stop in zip(starts, [*starts[1:], total], strict=True)]


def _each(row: Mapping[str, Any], name: str, ids: list[int]) -> list[int]:
    """The numbers of a column that has one for each token; none where it is not there."""
    values = _ints(row, name)
    if values and len(values) != len(ids):
        raise ProbeError(f"A row has {len(ids)} input_ids and {len(values)} of {name}; expected one for each token.")
    return values


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
