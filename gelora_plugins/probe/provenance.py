"""Which model a measurement was made on: its name, and a fingerprint that costs next to nothing."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

from gelora_plugins.probe.find_blocks import unwrap

if TYPE_CHECKING:
    from torch import nn

    from gelora_plugins.dimension.profile import DimensionProfile
    from gelora_plugins.layout import Block, ModelLayout

SAMPLE = 64  # weights of a block


def origin(model: nn.Module, layout: ModelLayout) -> dict[str, Any]:
    """What a profile says of the model that it is measured on."""
    return {
        "layout": layout,
        "model_name": model_name(model),
        "model_fingerprint": model_fingerprint(model, layout),
    }


def model_name(model: nn.Module) -> str | None:
    """What the model was loaded as: its id on the hub, or the last part of a path. None for one made from scratch."""
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return os.path.basename(os.path.abspath(name)) if os.path.isabs(name) or os.path.isdir(name) else name


def model_fingerprint(model: nn.Module, layout: ModelLayout) -> str | None:
    """`dtype:SHA-256` of some weights of the first linear map of every block, as they are in memory.

    The same model in another dtype, or quantised, has another dtype in front. None where weights are elsewhere
    (sharded, offloaded) or a block has no linear map.
    """
    digest, dtypes = hashlib.sha256(), set()
    for block in layout.blocks:
        sample = _weights(unwrap(model), block)
        if sample is None:
            return None
        digest.update(sample[0])
        dtypes.add(sample[1])
    return f"{'+'.join(sorted(dtypes))}:{digest.hexdigest()[:32]}"


def _weights(root: nn.Module, block: Block) -> tuple[bytes, str] | None:
    """Some weights of the first linear map of a block, and their dtype."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        module: Any = root.get_submodule(block.linears[0].name)
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = module.weight.data
        if weight.is_meta or not weight.numel() or hasattr(weight, "device_mesh"):
            return None
        flat = weight.reshape(-1)
        sample = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].contiguous().cpu()
        return sample.view(torch.uint8).numpy().tobytes(), str(weight.dtype).removeprefix("torch.")
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError):
        return None  # no such module here, or weights of a kind that cannot be read like this


def other_model(profile: DimensionProfile, model: nn.Module) -> str | None:
    """One sentence when `profile` was measured on another model than this one, as far as that is known."""
    then, now = profile.model_fingerprint, model_fingerprint(model, profile.layout)
    names = profile.model_name, model_name(model)
    if then and now and then.partition(":")[0] == now.partition(":")[0]:
        other = then != now
    else:  # another dtype: only the names can tell
        other = None not in names and names[0] != names[1]
    if not other:
        return None
    return (
        f"The plan was measured on {names[0] or 'a model without a name'}, and this is {names[1] or 'a model'} with "
        "other weights or another name: its ranks may not be those that a measurement here would give. Measure again, "
        "unless you mean it."
    )
