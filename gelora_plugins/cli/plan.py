"""`gelora plan`: a profile -> ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gelora_plugins.cli.options import MOST_RANK, AsJson, default_of, help_of
from gelora_plugins.cli.shown import show, show_paths
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import LayoutError
from gelora_plugins.plugins import available

EXAMPLES = (
    "gelora plan profile.json",
    "gelora plan profile.json --policy uniform --rank tokens",
    "gelora plan profile.json --policy budget --rank 16 --alpha 32 --target-modules q_proj,v_proj -o plan.json",
)


def plan(
    profile: Annotated[Path, typer.Argument(help="What gelora probe wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the plan goes.")] = Path("plan.json"),
    policy: Annotated[str, typer.Option(help=help_of("policy"))] = default_of("policy"),
    rounding: Annotated[str, typer.Option(help=help_of("rounding"))] = default_of("rounding"),
    min_rank: Annotated[int, typer.Option(help=help_of("min_rank"))] = default_of("min_rank"),
    scaling: Annotated[str, typer.Option(help=help_of("scaling"))] = default_of("scaling"),
    on_unsure: Annotated[str, typer.Option(help=help_of("on_unsure"))] = default_of("on_unsure"),
    rank: Annotated[
        str,
        typer.Option(
            help="Your own r: the budget, and what the scaling is measured by. Or a rule that chooses the budget, with "
            "the scaling of r = 8: auto, rows, tokens, dimension_mean, dimension_max, dimension_last."
        ),
    ] = "8",
    alpha: Annotated[float, typer.Option(help="Your own lora_alpha.")] = 16,
    rslora: Annotated[bool, typer.Option(help="Rank-stabilised LoRA: scaling is alpha / sqrt(r).")] = False,
    target_modules: Annotated[
        str, typer.Option(help="all-linear, or the endings of module names, with commas: q_proj,v_proj.")
    ] = "all-linear",
    as_json: AsJson = False,
) -> None:
    """Choose: a profile -> one rank per block, for LoraConfig or GeLoRACallback(plan=...). Needs no model."""
    own, rule = (int(rank), None) if rank.removeprefix("-").isdecimal() else (8, rank)
    if not 1 <= own <= MOST_RANK or rank not in {str(own), *available("rank rule")}:
        raise typer.BadParameter(
            f"{rank!r}; expected a whole number from 1 to {MOST_RANK}, or one of: {', '.join(available('rank rule'))}.",
            param_hint="--rank",
        )
    from gelora_plugins import json_files
    from gelora_plugins.dimension.profile import DimensionProfile
    from gelora_plugins.ranks.plan import layout_sites, named
    from gelora_plugins.ranks.verdict import sure_plan

    measured = DimensionProfile.from_dict(json_files.read_json(profile))
    sites = layout_sites(measured.layout, named(target_modules))
    if not sites:
        raise LayoutError(f"No linear map in the blocks of {profile} ends in any of: {target_modules}.")
    config = GeLoRAConfig(
        policy=policy, rounding=rounding, min_rank=min_rank, scaling=scaling, on_unsure=on_unsure, rank=rule
    )
    chosen = sure_plan(measured, config, sites, own, lora_alpha=alpha, use_rslora=rslora)
    chosen.save(output)
    show(chosen, as_json)
    show_paths([output], as_json)
