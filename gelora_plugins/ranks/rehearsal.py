"""The adapter that PEFT would make of a LoRA configuration, made on a copy of the model that has no weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from gelora_plugins.errors import LayoutError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.ranks.find_adapter import Adapter
from gelora_plugins.ranks.patterns import check_countable
from gelora_plugins.ranks.plan import Site

# What of a configuration reads weights, or makes other matrices, and has no say in which modules get an adapter.
PLAIN: dict[str, Any] = {"init_lora_weights": True, "use_dora": False, "kasa_config": None, "use_bdlora": None}


def config_sites(model: nn.Module, layout: ModelLayout, config: LoraConfig) -> tuple[Site, ...]:
    """The sites that `config` would adapt on `model`, which has no adapter: those of the adapter that PEFT makes of it.

    Raises:
        LayoutError: PEFT refuses the configuration, or it adapts no module of the blocks, or what it adapts can only
            be known once the adapter is made.
    """
    check_countable(layout, config)
    plain = copy.copy(config)
    for name, value in PLAIN.items():
        setattr(plain, name, value)
    empty = without_weights(model)
    frozen = [(p, p.requires_grad) for p in model.parameters()]  # PEFT freezes those that the copy shares
    try:
        with warnings.catch_warnings(action="ignore"):  # PEFT gives them when it makes the adapter itself
            LoraModel(empty, {"default": plain}, "default", low_cpu_mem_usage=True)
    except Exception as error:
        raise LayoutError(
            f"PEFT does not take this LoRA configuration for {type(model).__name__}: "
            f"{' '.join(str(error).split())} Name other "
            'target_modules, or leave modules out with exclude_modules=["..."].'
        ) from error
    finally:
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
    layers = {name: module for name, module in empty.named_modules() if isinstance(module, LoraLayer)}
    return Adapter(empty, "default", plain, layers).sites(layout)


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters are on the "meta" device; those that are more than numbers, as the quantised
    ones of bitsandbytes, and all buffers are the model's own."""
    copies: dict[nn.Module, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if module not in copies:
            twin = copies[module] = module.__new__(type(module))
            # A dictionary of its own for hooks, too: PEFT registers some.
            own = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
            twin.__dict__.update(own)
            for name, child in module._modules.items():
                twin._modules[name] = None if child is None else copied(child)
            for name, parameter in module._parameters.items():
                if type(parameter) is nn.Parameter:
                    twin._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        return copies[module]

    return copied(model)
