"""The documents of TRL's trainers, one for each row, in a form that can be measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from gelora_plugins.errors import ProbeError

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


def documents(trainer: Trainer, collator: Callable[[list[Any]], Any]) -> Any:
    """The training rows of a TRL trainer, in a form that can be measured: one document a row.

    SFT's rows are that already. A preference row stands for the first sequence that its trainer's collator makes of
    it, which is what the policy is to prefer: prompt and chosen answer (DPO, Reward), prompt and answer (KTO), cut as
    the trainer cuts it. Rows with images are left to the collator, with
    `first_of_each_pair`.

    Raises:
        ProbeError: the trainer has prompts only and writes its documents while it trains (GRPO, RLOO).
    """
    dataset = trainer.train_dataset
    first = next(iter(dataset), None)
    if getattr(trainer.args, "packing", False) and trainer.args.packing_strategy == "wrapped":
        logger.warning(
            "packing_strategy='wrapped' joins documents, cuts them anywhere, and keeps no trace of where they began "
            "(trl 1.16). Each packed row counts as one document for GeLoRA; packing_strategy='bfd' keeps documents."
        )
    if first is None or "input_ids" in first:
        return dataset
    batch = collator([dict(first)])
    if not isinstance(batch, Mapping):
        raise ProbeError(
            f"{type(trainer).__name__} has prompts only ({', '.join(first)}): it writes what it trains on while it "
            "trains, so there is nothing to measure yet. Make a plan before, from rows of token ids that are like it: "
            "select_ranks(model, rows, lora_config=peft_config).save('plan.json'), then pass "
            "GeLoRACallback(plan='plan.json')."
        )
    if "input_ids" not in batch or "pixel_values" in batch:
        return dataset

    def document(row: Mapping[str, Any]) -> dict[str, Any]:
        made = collator([dict(row)])
        return {name: made[name][0] for name in ("input_ids", "attention_mask") if name in made}

    return _View(dataset, document) if hasattr(dataset, "__len__") else map(document, dataset)


def first_of_each_pair(collator: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """`collator`, but of a batch of pairs only the sequences to prefer, with their images: TRL puts them before all the
    others, in every tensor (trl 1.16)."""

    @wraps(collator)
    def collate(rows: list[Any]) -> Any:
        batch = collator([dict(row) for row in rows])  # TRL's collator for images changes its rows
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is None or len(ids) != 2 * len(rows):
            return batch
        return {name: value[: len(value) // 2] for name, value in batch.items() if isinstance(value, torch.Tensor)}

    return collate


class _View:
    """A map-style dataset through a function of its rows, called for the rows that are asked for."""

    def __init__(self, dataset: Any, document: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self.dataset = dataset
        self.document = document

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.document(self.dataset[index])
