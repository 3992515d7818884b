"""Whether an optimizer holds an adapter."""

from __future__ import annotations

from typing import Any

from gelora_plugins.errors import TooLateError
from gelora_plugins.ranks.find_adapter import Adapter

WAYS_OUT = (
    "Make it of all the adapter's parameters (those that are not to be trained: requires_grad_(False)), or pass "
    "optimizer_cls_and_kwargs=... instead. One Trainer has one optimizer: for another adapter make another Trainer."
)


def check_held(optimizer: Any, adapter: Adapter) -> None:
    """Raises TooLateError unless every trainable parameter of `adapter` is in `optimizer`."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    # Layer-wise optimizers step in hooks, and the one that the Trainer sees is a dummy (transformers 5.23); torchao's
    # CPUOffloadOptimizer has copies in its groups.
    for kept in ("optimizer_dict", "param_d2h_map"):
        held.update(id(parameter) for parameter in getattr(inner, kept, None) or ())
    named = trained(adapter)
    missing = [name for name, parameter in named if id(parameter) not in held]
    if missing:
        raise TooLateError(
            f"The optimizer does not hold {len(missing)} of the {len(named)} trainable parameters of the adapter "
            f"{adapter.name!r}, {missing[0]} for one: they would never be trained. {WAYS_OUT}"
        )


def trained(adapter: Adapter) -> list[tuple[str, Any]]:
    """(name, parameter) of all of `adapter` that is trained."""
    return [
        (f"{name}.{key}", parameter)
        for name, layer in adapter.layers.items()
        for key, parameter in adapter.parameters(layer)
        if parameter.requires_grad
    ]
