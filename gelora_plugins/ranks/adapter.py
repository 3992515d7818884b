"""The only module that changes a model: gives a LoRA adapter that has not been trained its ranks, in place, and takes
ranks and modules out of one that has."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from gelora_plugins.errors import ApplyError
from gelora_plugins.plugins import find_layout
from gelora_plugins.probe.find_blocks import unwrap
from gelora_plugins.probe.no_trace import cuda_devices
from gelora_plugins.ranks.find_adapter import Adapter, find_adapter, require_adapter
from gelora_plugins.ranks.patterns import planned_config, with_patterns, with_ranks
from gelora_plugins.ranks.plan import RankPlan


@dataclass(frozen=True)
class AppliedPlan:
    """What was changed.

    Attributes:
        ranks: rank of every target module that the plan, or the checkpoint, decides.
        changed: the modules made anew, whose rank is another than before.
        kept: the other target modules, which keep the ranks of the user's LoRA configuration: those that its
            `rank_pattern` or `alpha_pattern` names, and those outside the blocks.
    """

    ranks: dict[str, int]
    changed: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def notes(self) -> tuple[str, ...]:
        """Which modules the plan had no say in, where there are some."""
        if not self.kept:
            return ()
        shown = ", ".join(self.kept[:3]) + (", ..." if len(self.kept) > 3 else "")
        return (
            f"{len(self.kept)} target modules keep the ranks of your LoRA configuration, because its rank_pattern or "
            f"alpha_pattern names them or because they lie outside the transformer blocks: {shown}.",
        )


def add_adapter(model: nn.Module, config: LoraConfig, plan: RankPlan | None) -> tuple[PeftModel, AppliedPlan]:
    """`model` in a new LoRA adapter made of `config`, with the ranks of `plan` if there is one.

    Raises:
        PlanError: see `planned_config`. Nothing was changed.
    """
    wrapped = get_peft_model(model, copy.copy(config) if plan is None else planned_config(config, plan))
    adapter = require_adapter(wrapped)
    if plan is None:
        ranks = {name: layer.r[adapter.name] for name, layer in adapter.layers.items()}
    else:
        ranks = planned_ranks(adapter, plan)
    return wrapped, AppliedPlan(ranks, tuple(ranks), _others(adapter, ranks))


def apply_plan(model: nn.Module, plan: RankPlan) -> AppliedPlan:
    """Give the fresh LoRA adapter of `model` the ranks of `plan`, in place, and write them into its configuration.

    A module whose rank does not change is not touched. New matrices get the dtype, device and requires_grad of the
    old ones, and are drawn from a seed of their own made of torch's seed and the module's name, so that the random
    state is as before and the rank of one module does not move another's draw.

    Raises:
        ApplyError: no adapter, a trained one, or one that cannot be changed in place. Nothing was changed.
        PlanError: the plan is for another model, other target modules or another scaling. Nothing was changed.
    """
    adapter = require_adapter(model)
    adapter.check_fresh()
    plan.check_sites(adapter.sites(find_layout(model)))
    modules = {site.name: [name for name in adapter.layers if name.startswith(f"{site.name}.")] for site in plan.sites}
    config = with_patterns(adapter.config, plan, modules)
    ranks = planned_ranks(adapter, plan)
    alphas = {name: plan.alpha(rank) for name, rank in ranks.items()}
    return AppliedPlan(ranks, _resize(adapter, config, ranks, alphas), _others(adapter, ranks))


def planned_ranks(adapter: Adapter, plan: RankPlan) -> dict[str, int]:
    """The rank that `plan` gives each layer which is free to get one."""
    return {
        name: rank for site, rank in zip(plan.sites, plan.ranks, strict=True) for name in adapter.free_layers(site.name)
    }


def _others(adapter: Adapter, ranks: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(name for name in adapter.layers if name not in ranks)


def has_ranks_of(model: nn.Module, saved: LoraConfig) -> bool:
    """Whether the adapter of `model` has the ranks and alphas that `saved`, a checkpoint's configuration, has."""
    adapter = find_adapter(model)
    if adapter is None:
        return False
    ranks, alphas = _saved(adapter, saved)
    return all(
        layer.r[adapter.name] == ranks[name] and layer.lora_alpha[adapter.name] == alphas[name]
        for name, layer in adapter.layers.items()
    )


def _saved(adapter: Adapter, saved: LoraConfig) -> tuple[dict[str, int], dict[str, float]]:
    ranks, alphas = {}, {}
    for name in adapter.layers:
        ranks[name] = saved.rank_pattern.get(get_pattern_key(saved.rank_pattern.keys(), name), saved.r)
        alphas[name] = saved.alpha_pattern.get(get_pattern_key(saved.alpha_pattern.keys(), name), saved.lora_alpha)
    return ranks, alphas


def apply_config(model: nn.Module, saved: LoraConfig) -> AppliedPlan:
    """Give the adapter of `model` the ranks and alphas that `saved`, a checkpoint's configuration, has: for resuming.

    Raises:
        ApplyError: no adapter, modules that would change are trained already, or only one of the two is
            rank-stabilised. Nothing was changed.
    """
    adapter = require_adapter(model)
    if saved.use_rslora != adapter.config.use_rslora:
        raise ApplyError(
            f"The checkpoint was trained with use_rslora={saved.use_rslora}, and the model's LoRA configuration says "
            f"{adapter.config.use_rslora}. Set it as it was."
        )
    ranks, alphas = _saved(adapter, saved)
    if any(rank != adapter.layers[name].r[adapter.name] for name, rank in ranks.items()):
        adapter.check_fresh()
    config = copy.copy(adapter.config)
    config.r, config.lora_alpha = saved.r, saved.lora_alpha
    config.rank_pattern, config.alpha_pattern = dict(saved.rank_pattern), dict(saved.alpha_pattern)
    changed = _resize(adapter, config, ranks, alphas)
    for name, layer in adapter.layers.items():
        if layer.lora_alpha[adapter.name] != alphas[name]:
            layer.lora_alpha[adapter.name] = alphas[name]
            layer.set_scale(adapter.name, 1)
    return AppliedPlan(ranks, changed)


def keep_rows(adapter: Adapter, rows: Mapping[str, Tensor]) -> None:
    """Take all but some ranks out of `adapter`, in place, and write those that it has then into its configuration.

    The Parameters stay the same objects, with another shape; so does the scaling of each module, and what other modules
    have. An optimizer may hold values of the old shapes.

    Args:
        rows: (k,) integers for each module, with k of at least 1: the rows of its lora_A and the columns of its lora_B
            that stay. Modules that are not named keep all.
    """
    for name, kept in rows.items():
        layer: Any = adapter.layers[name]
        before, after = layer.r[adapter.name], len(kept)
        if after == before:
            continue
        a, b = layer.lora_A[adapter.name], layer.lora_B[adapter.name]
        for linear, axis in ((a, 0), (b, 1)):
            linear.weight.grad = None  # of the old shape
            linear.weight.data = linear.weight.data.index_select(axis, kept.to(linear.weight.device))
        a.out_features = b.in_features = layer.r[adapter.name] = after
        share = after / before
        alpha = layer.lora_alpha[adapter.name] * (math.sqrt(share) if adapter.config.use_rslora else share)
        layer.lora_alpha[adapter.name] = int(alpha) if alpha == int(alpha) else alpha
    configs: Any = adapter.model.peft_config
    ranks = {name: layer.r[adapter.name] for name, layer in adapter.layers.items()}
    alphas = {name: layer.lora_alpha[adapter.name] for name, layer in adapter.layers.items()}
    configs[adapter.name] = with_ranks(configs[adapter.name], ranks, alphas)


def drop_modules(adapter: Adapter, names: Collection[str]) -> None:
    """Take `adapter` off the modules of these names, in place; its configuration gets the names of the others.

    What the model computes is the same where lora_B is 0. An optimizer may hold the matrices that are gone.
    """
    root = unwrap(adapter.model)
    for name in names:
        layer: Any = adapter.layers[name]
        if len(layer.r) > 1:
            layer.delete_adapter(adapter.name)  # others are on it
        else:
            parent, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(parent), leaf, layer.get_base_layer())
    configs: Any = adapter.model.peft_config
    config = copy.copy(configs[adapter.name])
    config.target_modules = {name for name in adapter.layers if name not in names}
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None  # the names say it all
    configs[adapter.name] = config


def _resize(
    adapter: Adapter, config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> tuple[str, ...]:
    changed = [name for name, rank in ranks.items() if rank != adapter.layers[name].r[adapter.name]]
    before = [entry for name in changed for entry in _entries(adapter.layers[name], adapter.name)]
    held = [(p, p.data, p.grad) for name in changed for _, p in adapter.parameters(adapter.layers[name])]
    modes = [(p, p.requires_grad) for layer in adapter.layers.values() for p in layer.parameters()]
    try:
        seed = torch.initial_seed()
        with torch.random.fork_rng(devices=cuda_devices()):
            for name in changed:
                torch.manual_seed((seed ^ zlib.crc32(name.encode())) % 2**63)
                _update_layer(adapter, adapter.layers[name], ranks[name], alphas[name], config)
    except BaseException:
        for container, value in before:
            container[adapter.name] = value
        for parameter, data, grad in held:
            parameter.data, parameter.grad = data, grad
        for parameter, requires_grad in modes:
            parameter.requires_grad_(requires_grad)
        raise
    configs: Any = adapter.model.peft_config
    configs[adapter.name] = config
    return tuple(changed)


def _update_layer(adapter: Adapter, layer: Any, rank: int, alpha: float, config: LoraConfig) -> None:
    """PEFT 0.21's `update_layer` makes new Parameters, with the dtype of the base weight, and gradients: undo that.

    The old Parameters stay, with the new values: an optimizer, or groups of parameters, may hold them already.
    """
    # PEFT casts and moves the old magnitude of DoRA, before it makes a new one.
    old = {key: (parameter, parameter.device, parameter.dtype) for key, parameter in adapter.parameters(layer)}
    others = [(p, p.requires_grad) for key, p in layer.named_parameters() if key not in old]
    modes = {module: module.training for module in layer.modules()}
    layer.update_layer(adapter.name, r=rank, lora_alpha=alpha, config=config)
    for module in layer.modules():
        module.training = modes.get(module, layer.training)
    for key, made in list(adapter.parameters(layer)):
        parameter, device, dtype = old[key]
        parameter.grad = None  # of the old shape
        parameter.data = made.data.to(device, dtype)
        owner, _, leaf = key.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, parameter)
    for parameter, requires_grad in others:
        parameter.requires_grad_(requires_grad)


def _entries(layer: Any, name: str) -> list[tuple[Any, Any]]:
    """(container, value) of everything that the layer keeps under this adapter's name."""
    containers: list[Any] = [*vars(layer).values(), *layer._modules.values()]
    kinds = (dict, nn.ModuleDict, nn.ParameterDict)
    return [(c, c[name]) for c in containers if isinstance(c, kinds) and name in c]
