"""Whether the parameters of a Trainer's model are, or will be, spread over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer


def is_sharded(trainer: Trainer) -> bool:
    """Whether parameters are, or will be, spread over processes: in place none of them can be resized."""
    return bool(trainer.is_fsdp_enabled or is_zero3(trainer) or is_loaded_sharded(trainer))


def is_zero3(trainer: Trainer) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions the parameters, which are empty then."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def is_loaded_sharded(trainer: Trainer) -> bool:
    """Whether `from_pretrained(distributed_config=...)` sharded the model (transformers 5.20 to 5.23)."""
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))
