"""The rows that a Trainer trains on, and what makes a batch of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


def _is_of_trl(trainer: Trainer) -> bool:
    return any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def collator_of(trainer: Trainer) -> Any:
    """What makes a batch of the training rows; a pair with images, which TRL's DPO trainer takes, counts once."""
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator)
    if _is_of_trl(trainer):
        from .trl_documents import first_of_each_pair

        return first_of_each_pair(collator)
    return collator


def documents_of(trainer: Trainer, collator: Any) -> Any:
    """The training rows; those of TRL's preference trainers have no `input_ids` yet."""
    if _is_of_trl(trainer):
        from .trl_documents import documents

        return documents(trainer, collator)
    return trainer.train_dataset
