"""The whole arrow: rows -> features -> dimensions -> ranks. Decided once, and the same in every process."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from functools import partial
from itertools import count, takewhile
from typing import TYPE_CHECKING, Any

from gelora_plugins import plugins
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.dimension.measure import estimate_dimensions
from gelora_plugins.dimension.profile import MIN_POINTS, DimensionProfile
from gelora_plugins.errors import DimensionError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.plugins import find_layout
from gelora_plugins.probe import generators
from gelora_plugins.probe.distributed import ALONE, Processes, blaming
from gelora_plugins.probe.documents import NO_DOCUMENTS, Collator, ProbeSet, choose_documents
from gelora_plugins.probe.find_blocks import unwrap
from gelora_plugins.probe.hidden_states import Autocast, read_documents
from gelora_plugins.probe.model_inputs import accepted_inputs
from gelora_plugins.probe.no_trace import leaving_no_trace
from gelora_plugins.probe.point_store import FeatureStore
from gelora_plugins.probe.provenance import origin, other_model
from gelora_plugins.ranks.find_adapter import find_adapter
from gelora_plugins.ranks.plan import RankPlan, Site
from gelora_plugins.ranks.policies import check_dimensions
from gelora_plugins.ranks.rehearsal import config_sites
from gelora_plugins.ranks.verdict import sure_plan

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

logger = logging.getLogger(__name__)

FIRST_CHUNK = 256  # documents; with fewer, the standard errors themselves are rough


def select_ranks(
    model: nn.Module,
    dataset: Any,
    config: GeLoRAConfig | None = None,
    *,
    lora_config: LoraConfig | None = None,
    collator: Collator | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
    autocast: Autocast = nullcontext,
) -> RankPlan:
    """`gelora_plugins.select_ranks`, of rows with `input_ids` or a `collator`; all else is as there."""
    config = config or GeLoRAConfig()
    with processes.together():
        adapter = find_adapter(model)
        if config.plan is None:
            plugins.find("policy", config.policy)  # a misspelt name must not cost a probe
            if isinstance(config.rank, str):
                plugins.find("rank rule", config.rank)
            if adapter is not None:
                adapter.check_fresh()
        layout = find_layout(model)
        if adapter is not None:
            lora_config, sites = adapter.config, adapter.sites(layout)
        else:
            lora_config = lora_config or _default_lora_config()
            sites = config_sites(model, layout, lora_config)
    r, lora_alpha, use_rslora = lora_config.r, lora_config.lora_alpha, lora_config.use_rslora
    if config.plan is not None:
        return processes.decide(partial(_load_plan, config.plan, model, sites, r, lora_alpha, use_rslora))
    how: dict[str, Any] = {"layout": layout, "collator": collator, "progress": progress, "processes": processes}
    with generators.kept(dataset, collator):
        profile = measure(model, dataset, config, **how, autocast=autocast)
    lora = {"lora_alpha": lora_alpha, "use_rslora": use_rslora}
    return processes.decide(lambda: sure_plan(profile, config, sites, r, **lora))


def _default_lora_config() -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(target_modules="all-linear")


def _load_plan(
    path: str, model: nn.Module, sites: tuple[Site, ...], r: int, lora_alpha: float, use_rslora: bool
) -> RankPlan:
    plan = RankPlan.load(path)
    plan.check_sites(sites)
    plan.check_scaling(r, lora_alpha, use_rslora)
    other = other_model(plan.profile, model)
    if other is not None:
        logger.warning("%s: %s", path, other)
    return plan


def measure(
    model: nn.Module,
    dataset: Any,
    config: GeLoRAConfig,
    *,
    layout: ModelLayout | None = None,
    collator: Collator | None = None,
    progress: bool = True,
    processes: Processes = ALONE,
    autocast: Autocast = nullcontext,
) -> DimensionProfile:
    """The intrinsic dimension of the hidden states of `dataset` at every block boundary of `model`.

    With `config.target_std_error`, growing numbers of documents are read, until the growth of the dimension over
    every block is known to that standard error.

    Raises:
        DimensionError: fewer than 50 distinct documents or points, or points that coincide inside the network.
        LayoutError, ProbeError: see `find_layout`, `choose_documents`, `read_documents`.
    """
    started = time.perf_counter()
    with processes.together():
        plugins.find("estimator", config.estimator)
        pooling = plugins.find("pooling", config.pooling)
        layout = layout or find_layout(model)
        probe_set = _choose(model, layout, dataset, config, collator) if processes.index == 0 else NO_DOCUMENTS
    counts = processes.decide(lambda: _growing(probe_set.num_documents, config))
    known = {**origin(model, layout), "options": config.measured()}
    num_tokens = 0
    with FeatureStore(config.feature_storage, counts[-1]) as store:
        for stop in counts:
            num_tokens += read_documents(
                model,
                layout,
                probe_set,
                pooling,
                store,
                config,
                stop=stop,
                processes=processes,
                progress=progress,
                autocast=autocast,
            )
            facts = {**known, "num_tokens": num_tokens, "seconds": time.perf_counter() - started}
            profile = processes.decide(partial(_profile, store, probe_set, config, facts))
            if profile is not None and _is_known(profile):
                break
    assert profile is not None  # with the last of the documents `_profile` gives one or raises
    check_dimensions(profile)
    return profile


def _choose(
    model: nn.Module, layout: ModelLayout, dataset: Any, config: GeLoRAConfig, collator: Collator | None
) -> ProbeSet:
    root, advice = unwrap(model), "Mend what reads the rows, or pass rows that can be read."
    model_config, accepted = getattr(root, "config", None), accepted_inputs(root, layout)
    with leaving_no_trace(model), blaming("Reading the training data", advice):  # which may augment rows at random
        probe_set = choose_documents(dataset, config, model_config, collator, accepted)
    if probe_set.num_documents < MIN_POINTS:
        raise DimensionError(
            f"The training data has {probe_set.num_documents} distinct documents ({probe_set.num_repeats} repeats were "
            f"left out); expected at least {MIN_POINTS} to measure a dimension. Give more data, raise probe_samples "
            f"(now {config.probe_samples}), or train without GeLoRA."
        )
    return probe_set


def _growing(num_documents: int, config: GeLoRAConfig) -> list[int]:
    """After how many documents to estimate: after all, or FIRST_CHUNK, twice that and so on for a target."""
    if config.target_std_error is None:
        return [num_documents]
    doublings = (FIRST_CHUNK * 2**i for i in count())
    return [*takewhile(lambda n: n < num_documents, doublings), num_documents]


def _profile(
    store: FeatureStore, probe_set: ProbeSet, config: GeLoRAConfig, facts: dict[str, Any]
) -> DimensionProfile | None:
    """The profile of the documents that were read; None when more of them may give the dimension that these lack."""
    try:
        estimates, num_repeated_points = estimate_dimensions(
            store,
            plugins.find("estimator", config.estimator),
            standardise=config.standardise,
            seed=config.probe_seed,
        )
    except DimensionError:
        if store.num_filled == probe_set.num_documents:
            raise
        return None
    return DimensionProfile(
        estimates=estimates,
        estimator=config.estimator,
        pooling=config.pooling,
        seed=config.probe_seed,
        num_documents=store.num_filled,
        num_repeated_inputs=probe_set.num_repeats,
        num_repeated_points=num_repeated_points,
        data_fingerprint=probe_set.fingerprint(store.num_filled),
        num_rows=probe_set.num_rows,
        num_targets=probe_set.num_targets,
        standardise=config.standardise,
        target_std_error=config.target_std_error,
        **facts,
    )


def _is_known(profile: DimensionProfile) -> bool:
    """Whether the growth over every block is known to the standard error that was asked for."""
    known = [error for error in profile.growth_std_errors() if error is not None]
    return profile.target_std_error is not None and bool(known) and max(known) <= profile.target_std_error
