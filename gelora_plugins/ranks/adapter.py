"""The only module that changes a model: the ranks of a LoRA adapter that has not been trained, in place."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from gelora_plugins.errors import ApplyError, LayoutError
from gelora_plugins.layout import ModelLayout, unwrap
from gelora_plugins.plugins import find_layout
from gelora_plugins.probe.hidden_states import cuda_devices
from gelora_plugins.ranks.patterns import matches_pattern, planned_config, users_config, with_patterns
from gelora_plugins.ranks.plan import RankPlan, Site, layout_sites

# PEFT 0.21: every other `init_lora_weights` reads or rewrites the base weight, a second time if run again, or
# (False, "orthogonal") makes lora_B other than 0, so that a fresh adapter cannot be told from a trained one.
IN_PLACE_INITS = (True, "gaussian")
# PEFT 0.21: KaSA truncates the base weight whenever a layer is made, BD-LoRA goes by a name that `update_layer` is not
# given, Arrow holds other adapters.
NOT_IN_PLACE = ("kasa_config", "use_bdlora", "arrow_config")
CONFIG_ROUTE = (
    "Choose the ranks before the adapter is made: plan = select_ranks(model, rows, lora_config=config), then "
    "get_peft_model(model, with_plan(config, plan, model)) with gelora_plugins.with_plan, or "
    "GeLoRACallback(lora_config=config) on the model without an adapter."
)


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


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on a model: its name, its configuration, its layers by the name that PEFT's patterns match.

    That is the module path from the unwrapped model, and for a fused parameter `<module>.<parameter>`. The
    configuration is the user's, without the patterns of a plan that was applied to it.
    """

    model: nn.Module
    name: str
    config: LoraConfig
    layers: dict[str, LoraLayer]

    def sites(self, layout: ModelLayout) -> tuple[Site, ...]:
        """The blocks that have target modules whose rank is free to choose, in block order.

        Modules that the user's own `rank_pattern` or `alpha_pattern` names are the user's, and so are modules
        outside the blocks (embeddings, heads): they keep their rank and are not counted.

        Raises:
            LayoutError: no target module lies in a block.
        """
        sites = []
        for block in layout.blocks:
            layers = self.free_layers(block.name).values()
            if layers:
                sides = [min(layer.in_features, layer.out_features) for layer in layers if layer.in_features]
                sites.append(Site(block.name, sum(map(self._cost, layers)), max(sides, default=None)))
        if not sites:
            if {site.pattern for site in layout_sites(layout, lambda name: True)} & set(self.config.rank_pattern):
                raise LayoutError(
                    "The adapter was made with the ranks of a plan (rank_pattern names whole blocks), and none of its "
                    f"{len(self.layers)} target modules is left to choose a rank for. Train it as it is, with "
                    "GeLoRACallback(plan=...) to check it, or make the adapter without the plan's patterns."
                )
            raise LayoutError(
                f"None of the {len(self.layers)} target modules of the adapter is free to get a rank: expected some "
                "in the transformer blocks that `rank_pattern` and `alpha_pattern` of your LoRA configuration leave "
                "open."
            )
        return tuple(sites)

    def _cost(self, layer: LoraLayer) -> int:
        """LoRA parameters of one rank; where the model is sharded the matrices are empty, and those of a linear map."""
        numel = sum(parameter.numel() for _, parameter in self.matrices(layer))
        return int(numel // layer.r[self.name] or layer.in_features + layer.out_features)

    def free_layers(self, block: str) -> dict[str, LoraLayer]:
        """The layers below `block` that no pattern of the user's names."""
        return {
            name: layer
            for name, layer in self.layers.items()
            if name.startswith(f"{block}.") and not matches_pattern(self.config, name)
        }

    def matrices(self, layer: LoraLayer) -> Iterator[tuple[str, Tensor]]:
        """(name within the layer, parameter) of everything whose shape follows the rank of this adapter."""
        for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            container: Any = getattr(layer, kind)
            if self.name in container:
                entry: Any = container[self.name]
                yield kind, getattr(entry, "weight", entry)

    def parameters(self, layer: LoraLayer) -> Iterator[tuple[str, nn.Parameter]]:
        """(name within the layer, parameter) of all that this adapter has there: matrices, biases, magnitudes."""
        for key, parameter in layer.named_parameters():
            container, name, *_ = key.split(".")
            if container != "base_layer" and name == self.name:
                yield key, parameter

    def check_fresh(self) -> None:
        """Raises ApplyError unless the ranks of this adapter can be changed in place."""
        if self.config.init_lora_weights not in IN_PLACE_INITS:
            raise ApplyError(
                f"init_lora_weights={self.config.init_lora_weights!r} cannot be run again on an adapter that exists; "
                f"in place GeLoRA takes {', '.join(map(repr, IN_PLACE_INITS))}. {CONFIG_ROUTE}"
            )
        for option in NOT_IN_PLACE:
            if getattr(self.config, option, None):
                raise ApplyError(f"{option} cannot be run again on an adapter that exists. {CONFIG_ROUTE}")
        if getattr(self.config, "alora_invocation_tokens", None) and not isinstance(self.model, PeftModel):
            raise ApplyError(
                "The adapter has alora_invocation_tokens, which do nothing outside a PeftModel (PEFT 0.21): nothing "
                "would be trained. Use get_peft_model(model, config) instead of model.add_adapter(config)."
            )
        if getattr(unwrap(self.model), "tp_size", None) not in (None, 1):
            raise ApplyError(f"The model is tensor-parallel; its adapter cannot be resized in place. {CONFIG_ROUTE}")
        for name, layer in self.layers.items():
            for kind, parameter in self.matrices(layer):
                if parameter.is_meta or parameter.numel() == 0:
                    raise ApplyError(f"{kind} of {name} is empty here: the model is sharded. {CONFIG_ROUTE}")
                if kind in ("lora_B", "lora_embedding_A") and bool(parameter.any()):
                    raise ApplyError(
                        f"The adapter is trained already: {kind} of {name} is not 0. GeLoRA chooses ranks before "
                        "training; train this adapter on without GeLoRA, or start from a fresh one."
                    )


def find_adapter(model: nn.Module) -> Adapter | None:
    """The active LoRA adapter of a PEFT model, or of a model with `add_adapter`; None when there is no adapter.

    Raises:
        ApplyError: the active adapter is not LoRA, several adapters are active, or the model is what a PeftModel holds.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) holds
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    if not configs:
        return None
    if not isinstance(model, PeftModel) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ApplyError(
            f"This {type(model).__name__} was given to get_peft_model before, which puts the adapter into the model "
            "itself (PEFT 0.21), or to a Trainer with GeLoRACallback(lora_config=...). Pass the PeftModel that came of "
            "it (trainer.model), or load the model again."
        )
    active = getattr(model, "active_adapters", None)
    names = list(active() if callable(active) else active or configs)
    if len(names) != 1:
        raise ApplyError(f"The adapters {', '.join(names)} are active; expected one. Activate the one to be trained.")
    config = configs[names[0]]
    if not isinstance(config, LoraConfig):
        raise ApplyError(f"The adapter {names[0]!r} is {config.peft_type}; GeLoRA chooses ranks for LoRA only.")
    layers = {
        _pattern_name(name, module): module
        for name, module in unwrap(model).named_modules()
        if isinstance(module, LoraLayer) and names[0] in module.r
    }
    return Adapter(model, names[0], users_config(config), layers)


def _pattern_name(name: str, layer: LoraLayer) -> str:
    """What PEFT matches its patterns with: wrappers of fused parameters lie within each other (PEFT 0.21)."""
    parameter = getattr(layer, "parameter_name", None)
    return name if parameter is None else f"{name.replace('.base_layer', '')}.{parameter}"


def add_adapter(model: nn.Module, config: LoraConfig, plan: RankPlan | None) -> tuple[PeftModel, AppliedPlan]:
    """`model` in a new LoRA adapter made of `config`, with the ranks of `plan` if there is one.

    Raises:
        PlanError: see `planned_config`. Nothing was changed.
    """
    wrapped = get_peft_model(model, copy.copy(config) if plan is None else planned_config(config, plan))
    adapter = replace(require_adapter(wrapped), config=config)
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


def require_adapter(model: nn.Module) -> Adapter:
    """`find_adapter`, or ApplyError when there is none."""
    adapter = find_adapter(model)
    inside = next((name for name, module in model.named_modules() if name and isinstance(module, PeftModel)), None)
    if adapter is None and inside is not None:
        raise ApplyError(
            f"The adapter is on `{inside}` of {type(model).__name__}, a module around a PeftModel, which GeLoRA does "
            f"not look into. Give it its ranks before: plan = select_ranks(model.{inside}, rows); "
            f"apply_plan(model.{inside}, plan); then train without GeLoRACallback."
        )
    if adapter is None or not adapter.layers:
        raise ApplyError(
            "The model has no LoRA adapter; expected one to give ranks to. Wrap it with get_peft_model(model, "
            "LoraConfig(...)), or pass GeLoRACallback(lora_config=LoraConfig(...)); with TRL pass peft_config."
        )
    return adapter


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
