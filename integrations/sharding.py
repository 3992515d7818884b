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


def is_still_whole(trainer: Trainer) -> bool:
    """Whether FSDP2 is to shard the model and has not yet, so that its adapter can be measured for and resized.

    `train()` shards it after the ranks are settled (transformers 5.23). A quantised one is left alone: none was tried.
    """
    from torch.distributed.tensor import DTensor

    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return (
        plugin is not None
        and plugin.fsdp_version == 2
        and not is_loaded_sharded(trainer)
        and trainer.model is not None
        and not getattr(trainer.model, "is_quantized", False)
        and not any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    )


def has_first_alone_weights(trainer: Trainer) -> bool:
    """Whether the weights that count are those of the first process: the others may have empty parameters.

    So it is under FSDP with cpu_ram_efficient_loading: accelerate 1.15 sends them when it shards the model.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return bool(plugin is not None and plugin.cpu_ram_efficient_loading)
