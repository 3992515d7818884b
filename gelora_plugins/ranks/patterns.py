"""LoRA configurations, before there is an adapter: which can be counted, and one with the ranks of a plan."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn

from gelora_plugins.errors import ApplyError, LayoutError, PlanError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.ranks.pattern_keys import key_of, keys_ever, loose_key
from gelora_plugins.ranks.plan import RankPlan

IN_PLACE_ROUTE = (
    "Make the adapter first, with get_peft_model(model, config); GeLoRA then gives it its ranks in place, with "
    "GeLoRACallback() or select_ranks and apply_plan."
)
# What PEFT 0.21 expects to be run on the model before or after `get_peft_model`; without it, EVA and LoRA-GA train as
# plain LoRA and say nothing.
NEEDS_DATA = {
    "corda": "preprocess_corda(model, config, ...) before get_peft_model",
    "eva": "initialize_lora_eva_weights(model, ...) after get_peft_model, with EvaConfig(rho=1.0) to keep the ranks",
    "lora_ga": "preprocess_loraga(model, config, ...) before get_peft_model",
}
# The projections that transformers 5 fuses, by the names that PEFT's `target_modules` still may have for them.
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Attribute of a LoraConfig that a plan was written into: the patterns that it had before, which are the user's. Not a
# field, so PEFT saves nothing of it.
OWN_PATTERNS = "_patterns_before_gelora"


def matches_pattern(config: LoraConfig, name: str) -> bool:
    """Whether the `rank_pattern` or `alpha_pattern` of `config` names the module."""
    return any(
        get_pattern_key(pattern.keys(), name) in pattern for pattern in (config.rank_pattern, config.alpha_pattern)
    )


def check_countable(layout: ModelLayout, config: LoraConfig) -> None:
    """Raises LayoutError when what `config` adapts is only known once the adapter is made."""
    if config.layer_replication:
        raise LayoutError(
            f"layer_replication={config.layer_replication} makes blocks that the model does not have yet, so their "
            f"ranks cannot be chosen before. {IN_PLACE_ROUTE}"
        )
    if config.target_parameters or _becomes_fused(layout.model_type, config):
        raise LayoutError(
            f"The LoRA configuration adapts fused parameters of {layout.model_type!r} (target_parameters, or target "
            "modules that PEFT turns into them), which cannot be counted before the adapter is made. "
            f"{IN_PLACE_ROUTE}"
        )


def _becomes_fused(model_type: str, config: LoraConfig) -> bool:
    """Whether PEFT 0.20 and 0.21 turn some target modules into fused parameters of this kind of model."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    stub = nn.Module()
    stub.config = SimpleNamespace(model_type=model_type)  # type: ignore[assignment]
    named = config.target_modules
    # "all-linear" becomes them all; what a regex means to PEFT depends on the model's parameters, so none is taken.
    targets = list(EXPERTS) if named is None or isinstance(named, str) else list(named)
    probe = LoraConfig(target_modules=targets)
    convert_peft_config_for_transformers(probe, model=stub, conversions=None)
    return bool(probe.target_parameters)


def planned_config(config: LoraConfig, plan: RankPlan) -> LoraConfig:
    """A copy of `config` with the ranks of `plan`; modules that the user's own patterns name stay the user's.

    Raises:
        PlanError: the plan keeps another scaling than `config` has, or has ranks that `config` cannot take.
    """
    config = users_config(config)
    blocks = {block.name: [linear.name for linear in block.linears] for block in plan.profile.layout.blocks}
    odd = [site.name for site, rank in zip(plan.sites, plan.ranks, strict=True) if rank % 2]
    if config.init_lora_weights == "orthogonal" and odd:
        raise PlanError(
            f"init_lora_weights='orthogonal' takes even ranks only (PEFT 0.21), and the plan has odd ones for "
            f"{', '.join(odd)}. Use init_lora_weights=True or 'gaussian'."
        )
    return with_patterns(config, plan, blocks)


def with_patterns(config: LoraConfig, plan: RankPlan, modules: Mapping[str, list[str]]) -> LoraConfig:
    """`planned_config`, for the modules of each block.

    Where a block has modules of the user's its other modules get a key each: the first match wins, but
    `save_pretrained` sorts the keys (PEFT 0.21), so no key of ours may match a module of the user's.
    """
    write = loose_key if config.init_lora_weights == "eva" else key_of
    plan.check_scaling(config.r, config.lora_alpha, config.use_rslora)
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        names = modules[site.name]
        free = [name for name in names if not matches_pattern(config, name)]
        for key in [write(site.name, inside=True)] if free == names else map(write, free):
            ranks[key], alphas[key] = rank, plan.alpha(rank)
    changed = copy.copy(config)  # TRL's "ref" adapter shares the user's object
    changed.rank_pattern, changed.alpha_pattern = ranks, alphas
    setattr(changed, OWN_PATTERNS, (config.rank_pattern, config.alpha_pattern))
    return changed


def with_ranks(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    """A copy of `config` that gives each target module this rank and lora_alpha.

    Its patterns have a key for each module that differs from `r` or `lora_alpha`, and no other: a key that was there
    may match modules of other ranks by now, and the first match wins, in the order in which PEFT saves them.
    """
    changed = copy.copy(config)
    changed.rank_pattern = {key_of(name): rank for name, rank in ranks.items() if rank != config.r}
    changed.alpha_pattern = {key_of(name): a for name, a in alphas.items() if a != config.lora_alpha}
    return changed


def users_config(config: LoraConfig) -> LoraConfig:
    """`config` without the patterns of a plan that `with_plan` or `apply_plan` wrote into it."""
    own = getattr(config, OWN_PATTERNS, None)
    return config if own is None else _with_own(config, *own)


def without_plan(config: LoraConfig, plan: RankPlan, names: Iterable[str]) -> LoraConfig:
    """`config` without the patterns of `plan`, whoever wrote them: from a file, or with `plan.lora_config_kwargs()`.

    Args:
        names: the target modules.
    """
    if hasattr(config, OWN_PATTERNS):
        return users_config(config)
    keys = {key for site in plan.sites for key in keys_ever(site.name, inside=True)}
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        inside = [name for name in names if name.startswith(f"{site.name}.")]
        keys.update(key for name in inside for key in keys_ever(name) if config.rank_pattern.get(key) == rank)
    ranks = {key: rank for key, rank in config.rank_pattern.items() if key not in keys}
    alphas = {key: alpha for key, alpha in config.alpha_pattern.items() if key not in keys}
    return _with_own(config, ranks, alphas)


def _with_own(config: LoraConfig, ranks: dict[str, int], alphas: dict[str, float]) -> LoraConfig:
    own = copy.copy(config)
    own.rank_pattern, own.alpha_pattern = dict(ranks), dict(alphas)
    vars(own).pop(OWN_PATTERNS, None)
    return own


def check_initialisation(config: LoraConfig) -> None:
    """Raises ApplyError when an adapter of `config` is not ready to train as `get_peft_model` makes it."""
    needed = NEEDS_DATA.get(str(config.init_lora_weights))
    if needed is not None:
        raise ApplyError(
            f"init_lora_weights={config.init_lora_weights!r} needs {needed}, for which GeLoRACallback(lora_config=...) "
            "leaves no room. Choose the ranks in a step of your own: plan = select_ranks(model, rows, "
            "lora_config=config), then gelora_plugins.with_plan(config, plan, model); make the adapter as "
            "PEFT describes, and train it without GeLoRACallback."
        )
