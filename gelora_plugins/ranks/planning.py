"""A profile, and a policy by its name -> a plan. Needs no torch."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from gelora_plugins import plugins
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.plan import RankPlan, Site
from gelora_plugins.ranks.totals import total_rank

Policy = Callable[[DimensionProfile, Sequence[Site], int, GeLoRAConfig], Sequence[int]]


def make_plan(
    profile: DimensionProfile,
    config: GeLoRAConfig,
    sites: Sequence[Site],
    base_rank: int,
    *,
    lora_alpha: float,
    use_rslora: bool = False,
) -> RankPlan:
    """The ranks that `config.policy` gives `sites`, and how often it gives others on redraws of `profile`, as a plan.

    A rank below `config.min_rank` is raised to it, and one above what the matrices of a site can hold is held to that.
    So is the total that `config.rank` chooses, for each redraw anew: a rule may follow the dimensions.

    Raises:
        ConfigError: the policy, or the rule that `config.rank` names, does not exist.
        PlanError: the rule cannot say; the policy returned something else than one rank of at least 1 per site, for
            the profile or for one of its redraws.
    """
    policy: Policy = plugins.find("policy", config.policy)
    most = max((site.most(base_rank) for site in sites), default=base_rank)

    def chosen(measured: DimensionProfile) -> RankPlan:
        total = min(total_rank(config.rank, measured, sites, base_rank), most)
        ranks = policy(measured, sites, total, config)
        if not isinstance(ranks, Iterable):
            raise PlanError(f"The policy {config.policy!r} returned {ranks!r:.80}; expected one rank per site.")
        try:
            return RankPlan(
                sites=tuple(sites),
                ranks=_held(tuple(ranks), sites, base_rank, config.min_rank),
                base_rank=base_rank,
                lora_alpha=lora_alpha,
                use_rslora=use_rslora,
                policy=config.policy,
                rounding=config.rounding,
                min_rank=config.min_rank,
                scaling_rule=config.scaling,
                total_rank=None if config.rank is None else total,
                rank_rule=config.rank if isinstance(config.rank, str) else None,
                profile=measured,
            )
        except PlanError as error:
            raise PlanError(f"The policy {config.policy!r} made no usable plan: {error}") from error

    plan = chosen(profile)
    redrawn = [chosen(redraw).ranks for redraw in profile.redraws()]
    changes = tuple(
        sum(other != rank for other in others) / len(others)
        for rank, *others in zip(plan.ranks, *redrawn, strict=True)
        if others
    )
    return replace(plan, rank_changes=changes)


def _held(ranks: tuple[Any, ...], sites: Sequence[Site], base_rank: int, least: int) -> tuple[Any, ...]:
    if len(ranks) != len(sites) or not all(isinstance(rank, int) and rank >= 1 for rank in ranks):
        return ranks  # which makes no plan
    return tuple(min(max(rank, least), site.most(base_rank)) for rank, site in zip(ranks, sites, strict=True))
