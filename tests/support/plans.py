"""Profiles, sites and plans with chosen numbers, for tests of what is done with them."""

import json
import random
from dataclasses import replace

from gelora_plugins.dimension.profile import DimensionEstimate, DimensionProfile
from gelora_plugins.layout import Block, Linear, ModelLayout
from gelora_plugins.ranks.plan import RankPlan, Site

SST2 = (15.0, 17.2, 17.8, 17.4, 17.8, 19.1, 16.2)  # all-MiniLM-L6, mean pooling, 2000 training rows


def make_profile(*stacks, replicates=0, spread=0.1):
    """A profile with these dimensions, one sequence per stack; None is a boundary without a dimension.

    With `replicates`, each dimension has that many, of the standard deviation `spread`, independent of the others.
    """
    rng = random.Random(0)
    names = ["model.layers"] if len(stacks) == 1 else ["encoder.block", "decoder.block"]
    layout = ModelLayout(
        model_type="test",
        backbone="model",
        stacks=tuple(
            tuple(
                Block(f"{name}.{i}", (Linear(f"{name}.{i}.q", 8, 8), Linear(f"{name}.{i}.up", 8, 32)))
                for i in range(len(dimensions) - 1)
            )
            for name, dimensions in zip(names, stacks, strict=True)
        ),
    )
    return DimensionProfile(
        layout=layout,
        estimates=tuple(
            _estimate(value, tuple(rng.gauss(value, spread) for _ in range(replicates)) if value is not None else ())
            for dimensions in stacks
            for value in dimensions
        ),
        estimator="twonn_mle",
        pooling="mean",
        seed=0,
        num_documents=1000,
        num_repeated_inputs=3,
        num_repeated_points=2,
        num_tokens=50_000,
        seconds=1.5,
        data_fingerprint="0" * 64,
    )


def make_sites(profile, costs=None):
    """One site per block, with these costs of one rank; 56 each if not given."""
    blocks = profile.layout.blocks
    return tuple(Site(block.name, cost) for block, cost in zip(blocks, costs or [56] * len(blocks), strict=True))


def make_plan(
    dimensions=SST2, ranks=(3, 2, 1, 2, 2, 1), base_rank=8, lora_alpha=16, use_rslora=False, rank_changes=(), **options
):
    """A plan with these ranks, all its records filled; `options` go to `make_profile`."""
    profile = make_profile(dimensions, **options)
    return RankPlan(
        sites=make_sites(profile),
        ranks=tuple(ranks),
        base_rank=base_rank,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        policy="gelora",
        rounding="dimensions",
        profile=profile,
        rank_changes=tuple(rank_changes),
    )


def plan_for(model, ranks, config):
    """A plan with these ranks, one per block, for the adapter that `config` makes on `model`; nothing is measured."""
    from gelora_plugins.plugins import find_layout
    from gelora_plugins.ranks.rehearsal import config_sites

    layout = find_layout(model)
    return RankPlan(
        sites=config_sites(model, layout, config),
        ranks=tuple(ranks),
        base_rank=config.r,
        lora_alpha=config.lora_alpha,
        use_rslora=config.use_rslora,
        policy="gelora",
        rounding="nearest",
        profile=replace(make_profile([3.0] * layout.num_boundaries), layout=layout),
    )


def _estimate(value, replicates):
    if value is None:
        return DimensionEstimate(value=None, num_points=1, degenerate="only 1 of 998 points are distinct.")
    return DimensionEstimate(
        value=value,
        num_points=998,
        std_error=value / 30,
        interval=(0.9 * value, 1.1 * value),
        replicates=replicates,
    )


PLAN = make_plan(dimensions=(None, *SST2[1:]), replicates=2, rank_changes=(0.0, 0.5, 1.0, 0.25, 0.0, 1.0))


def as_json(plan):
    return json.loads(json.dumps(plan.to_dict()))
