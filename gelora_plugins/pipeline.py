"""The whole arrow: rows -> features -> dimensions -> ranks. Decided once, and the same in every process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gelora_plugins import plugins
from gelora_plugins.adapter import config_sites, find_adapter
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.dimension import MIN_POINTS, DimensionEstimate, DimensionProfile
from gelora_plugins.errors import DimensionError
from gelora_plugins.estimators import repeats
from gelora_plugins.features import PooledFeatures, collect_features, leaving_no_trace
from gelora_plugins.layout import ModelLayout, unwrap
from gelora_plugins.policies import check_dimensions, make_plan
from gelora_plugins.probe_set import Collator, ProbeSet, choose_documents
from gelora_plugins.ranks import RankPlan

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


def select_ranks(
    model: nn.Module,
    dataset: Any,
    config: GeLoRAConfig | None = None,
    *,
    lora_config: LoraConfig | None = None,
    collator: Collator | None = None,
    progress: bool = True,
) -> RankPlan:
    """Measure `dataset` in `model` and choose a LoRA rank for every block. The model is left as it was.

    Args:
        model: a model without an adapter, or a PEFT model whose LoRA adapter has not been trained.
        dataset: the training rows, with `input_ids`; others need a `collator`.
        config: the options.
        lora_config: for a model without an adapter, the configuration it will get; the default adapts every
            linear map of the blocks with PEFT's default `r` and `lora_alpha`.
        progress: whether to show a progress bar.

    Returns:
        The plan: `apply_plan(model, plan)` for an adapter that exists, `LoraConfig(**plan.lora_config_kwargs())`
        for one to be made.

    Raises:
        GeLoRAError: nothing can be measured or chosen; the message says why and what to do.
    """
    config = config or GeLoRAConfig()
    adapter = find_adapter(model)
    if config.plan is None:
        plugins.find("policy", config.policy)  # a misspelt name must not cost a probe
        if adapter is not None:
            adapter.check_fresh()
    layout = find_layout(model)
    if adapter is not None:
        lora_config, sites = adapter.config, adapter.sites(layout)
    else:
        if lora_config is None:
            from peft import LoraConfig

            lora_config = LoraConfig(target_modules="all-linear")
        sites = config_sites(layout, lora_config)
    if config.plan is not None:
        plan = RankPlan.load(config.plan)
        plan.check_sites(sites)
        plan.check_scaling(lora_config.r, lora_config.lora_alpha, lora_config.use_rslora)
        return plan
    profile = measure(model, dataset, config, layout=layout, collator=collator, progress=progress)
    return make_plan(
        profile, config, sites, lora_config.r, lora_alpha=lora_config.lora_alpha, use_rslora=lora_config.use_rslora
    )


def find_layout(model: nn.Module) -> ModelLayout:
    """The layout that the first plugin to know the model gives. Raises LayoutError when none does."""
    layout: ModelLayout = plugins.plugin_manager().hook.find_model_layout(model=model)
    return layout


def measure(
    model: nn.Module,
    dataset: Any,
    config: GeLoRAConfig,
    *,
    layout: ModelLayout | None = None,
    collator: Collator | None = None,
    progress: bool = True,
) -> DimensionProfile:
    """The intrinsic dimension of the hidden states of `dataset` at every block boundary of `model`.

    Raises:
        DimensionError: fewer than 50 distinct documents or points, or points that coincide inside the network.
        LayoutError, ProbeError: see `find_layout`, `choose_documents`, `collect_features`.
    """
    started = time.perf_counter()
    estimator = plugins.find("estimator", config.estimator)
    pooling = plugins.find("pooling", config.pooling)
    layout = layout or find_layout(model)
    with leaving_no_trace(model):  # rows may be augmented at random when they are read
        probe_set = choose_documents(dataset, config, unwrap(model).config, collator)
    if probe_set.num_documents < MIN_POINTS:
        raise DimensionError(
            f"The training data has {probe_set.num_documents} distinct documents ({probe_set.num_repeats} repeats were "
            f"left out); expected at least {MIN_POINTS} to measure a dimension. Give more data, raise probe_samples "
            f"(now {config.probe_samples}), or train without GeLoRA."
        )
    features = collect_features(model, layout, _with_bar(probe_set, config, progress), pooling)
    estimates, num_repeated_points = estimate_dimensions(features, estimator)
    profile = DimensionProfile(
        layout=layout,
        estimates=estimates,
        estimator=config.estimator,
        pooling=config.pooling,
        seed=config.probe_seed,
        num_documents=probe_set.num_documents,
        num_repeated_inputs=probe_set.num_repeats,
        num_repeated_points=num_repeated_points,
        num_tokens=features.num_tokens,
        seconds=time.perf_counter() - started,
        data_fingerprint=probe_set.fingerprint,
    )
    check_dimensions(profile)
    return profile


def estimate_dimensions(features: PooledFeatures, estimator: Any) -> tuple[tuple[DimensionEstimate, ...], int]:
    """One estimate per boundary, all on the same documents, and how many documents were left out.

    A document whose point coincides with another's at any boundary is left out at all of them. A boundary where
    more than half of the points coincide, or fewer than 50 are distinct, has no dimension and no say in that.
    """
    coincide = [repeats(points) for points in features.points]
    reasons = [_degenerate(mask) for mask in coincide]
    dropped = torch.zeros_like(coincide[0])
    for mask, reason in zip(coincide, reasons, strict=True):
        if not reason:
            dropped |= mask
    kept = ~dropped
    if int(kept.sum()) < MIN_POINTS:
        raise DimensionError(
            f"{int(kept.sum())} of {len(kept)} documents have a point of their own at every block boundary; expected "
            f"at least {MIN_POINTS}. Measure on more, or more varied, data, or choose another pooling."
        )
    estimates = tuple(
        DimensionEstimate(value=None, num_points=int((~mask).sum()), degenerate=reason)
        if reason
        else _estimate(estimator, points[kept], boundary)
        for boundary, (points, mask, reason) in enumerate(zip(features.points, coincide, reasons, strict=True))
    )
    return estimates, int(dropped.sum())


def _degenerate(repeated: Tensor) -> str:
    distinct = int((~repeated).sum())
    if distinct >= MIN_POINTS and 2 * distinct >= len(repeated):
        return ""
    return f"only {distinct} of {len(repeated)} points are distinct."


def _estimate(estimator: Any, points: Tensor, boundary: int) -> DimensionEstimate:
    try:
        estimate = estimator(points)
    except DimensionError as error:
        raise DimensionError(f"Boundary {boundary}: {error}") from error
    if not isinstance(estimate, DimensionEstimate):
        raise DimensionError(f"The estimator returned a {type(estimate).__name__}; expected a DimensionEstimate.")
    return estimate


def _with_bar(probe_set: ProbeSet, config: GeLoRAConfig, progress: bool) -> Iterator[dict[str, Tensor]]:
    total = -(-probe_set.num_documents // config.probe_batch_size)
    yield from tqdm(probe_set.batches(), total=total, desc="GeLoRA probe", unit="batch", disable=not progress)
