"""Whether the adapter of a model is the one that a plan describes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from gelora_plugins.adapter import planned_ranks, require_adapter
from gelora_plugins.errors import PlanError
from gelora_plugins.lora_config import without_plan
from gelora_plugins.plugins import find_layout

if TYPE_CHECKING:
    from torch import nn

    from gelora_plugins.ranks import RankPlan


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
        f"{plan.scaling:g}"
        for name, rank in planned_ranks(adapter, plan).items()
        for layer in [adapter.layers[name]]
        if layer.r[adapter.name] != rank or not math.isclose(layer.scaling[adapter.name], plan.scaling, rel_tol=1e-6)
    ]
    if wrong:
        raise PlanError(
            f"{len(wrong)} of {len(adapter.layers)} target modules have another rank or scaling than the plan gives "
            f"them: {wrong[0]}. Make the adapter with with_plan(config, plan, model), or apply_plan(model, plan)."
        )
