"""Whether a plan is for a model and its LoRA configuration, and an adapter the one that the plan describes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from gelora_plugins.errors import PlanError
from gelora_plugins.plugins import find_layout
from gelora_plugins.ranks.adapter import planned_ranks
from gelora_plugins.ranks.find_adapter import require_adapter
from gelora_plugins.ranks.patterns import planned_config, users_config, without_plan
from gelora_plugins.ranks.rehearsal import config_sites

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from gelora_plugins.ranks.plan import RankPlan


def with_plan(config: LoraConfig, plan: RankPlan, model: nn.Module | None = None) -> LoraConfig:
    """A copy of `config` with the ranks of `plan`; modules that the user's own patterns name stay the user's.

    Args:
        model: the model, without an adapter, that `config` is for. PEFT ignores patterns that match no module, so a
            plan of another model is noticed only where this is given, or by `check_plan` once the adapter is made.

    Raises:
        PlanError: the plan keeps another scaling than `config` has, has ranks that `config` cannot take, or is not
            for the blocks and target modules that `config` adapts in `model`.
        LayoutError: see `config_sites`.
    """
    if model is not None:
        plan.check_sites(config_sites(model, find_layout(model), users_config(config)))
    return planned_config(config, plan)


def check_plan(model: nn.Module, plan: RankPlan) -> None:
    """Compare the adapter that `model` has with `plan`: the ranks as built, the scaling, the blocks.

    For an adapter made with the plan's patterns, which PEFT ignores without a word where they match no module. The
    model may be sharded; nothing is changed.

    Raises:
        ApplyError: the model has no LoRA adapter.
        LayoutError: its blocks are not found.
        PlanError: the adapter is not the plan's; the first difference is named.
    """
    adapter = require_adapter(model)
    adapter = replace(adapter, config=without_plan(adapter.config, plan, adapter.layers))
    plan.check_sites(adapter.sites(find_layout(model)))
    wrong = [
        f"{name} has rank {layer.r[adapter.name]} and scaling {layer.scaling[adapter.name]:g}, the plan {rank} and "
        f"{plan.scaling_of(rank):g}"
        for name, rank in planned_ranks(adapter, plan).items()
        for layer in [adapter.layers[name]]
        if layer.r[adapter.name] != rank
        or not math.isclose(layer.scaling[adapter.name], plan.scaling_of(rank), rel_tol=1e-6)
    ]
    if wrong:
        raise PlanError(
            f"{len(wrong)} of {len(adapter.layers)} target modules have another rank or scaling than the plan gives "
            f"them: {wrong[0]}. Make the adapter with with_plan(config, plan, model), or apply_plan(model, plan)."
        )
