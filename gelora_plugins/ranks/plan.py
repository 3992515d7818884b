"""What was chosen: RankPlan, one rank for the target modules of each block. Needs no torch."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from gelora_plugins import json_files
from gelora_plugins.config import SCALINGS
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.errors import PlanError
from gelora_plugins.layout import ModelLayout
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.ranks.pattern_keys import key_of
from gelora_plugins.text import html_table, printable

PLAN = Path("gelora", "plan.json")  # below an output directory of a training, and below each checkpoint
MAX_RANK = 2**16  # no linear map of a model that is trained today has a side that is longer


@dataclass(frozen=True)
class Site:
    """Where one rank applies: all target modules below the module path `name`.

    Attributes:
        parameters_per_rank: what one more rank costs there: the sum of inputs and outputs of the target modules.
        max_rank: the highest rank that the update of any of them can have, which is its shorter side; a small gate
            among them does not bound the others. None in plans that were written before this was recorded.
    """

    name: str
    parameters_per_rank: int
    max_rank: int | None = None

    def most(self, base_rank: int) -> int:
        """The largest rank to choose here: what the matrices hold, or the user's own `r` where that is more."""
        return json_files.MAX_INT if self.max_rank is None else max(self.max_rank, base_rank)

    @property
    def pattern(self) -> str:
        """Key for PEFT's patterns."""
        return key_of(self.name, inside=True)


def layout_sites(layout: ModelLayout, is_target: Callable[[str], bool]) -> tuple[Site, ...]:
    """The blocks of `layout` that have linear maps for which `is_target(module path)` is true."""
    sites = []
    for block in layout.blocks:
        targets = [linear for linear in block.linears if is_target(linear.name)]
        if targets:
            cost = sum(linear.in_features + linear.out_features for linear in targets)
            most = max(min(linear.in_features, linear.out_features) for linear in targets)
            sites.append(Site(block.name, cost, most))
    return tuple(sites)


def named(target_modules: str) -> Callable[[str], bool]:
    """Whether a module path is among `target_modules`: "all-linear", or endings of paths with commas between them."""
    names = [name.strip() for name in target_modules.split(",")]
    return lambda path: names == ["all-linear"] or any(path == name or path.endswith(f".{name}") for name in names)


@dataclass(frozen=True)
class RankPlan:
    """One LoRA rank per site, and the rule of their scaling.

    Attributes:
        sites, ranks: in the order of the model's blocks.
        base_rank: `r` of the user's LoRA configuration.
        lora_alpha: `lora_alpha` of the user's LoRA configuration; with `base_rank` it fixes the scaling,
            lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA.
        use_rslora: whether the adapter is rank-stabilised.
        policy: name of the policy that chose the ranks.
        rounding: how it made them whole.
        profile: what the ranks were chosen from.
        min_rank: no rank was chosen below this.
        scaling_rule: "constant" where all ranks have the scaling of `base_rank`, "equal_step" where it falls as one
            over the rank.
        total_rank: the rank whose cost at every block the policy was given in place of that of `base_rank`; None where
            it was `base_rank` itself.
        rank_rule: the name of the rule that chose `total_rank`; None where the user did.
        rank_changes: for each site the share, 0 to 1, of `profile.redraws()` in which the policy gives another rank;
            empty where the profile has none.
    """

    sites: tuple[Site, ...]
    ranks: tuple[int, ...]
    base_rank: int
    lora_alpha: float
    use_rslora: bool
    policy: str
    rounding: str
    profile: DimensionProfile
    rank_changes: tuple[float, ...] = ()
    min_rank: int = 1
    scaling_rule: str = "constant"
    total_rank: int | None = None
    rank_rule: str | None = None

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.sites) or not self.sites:
            raise PlanError(f"A plan has {len(self.ranks)} ranks for {len(self.sites)} sites; expected one each.")
        if not (1 <= self.base_rank <= MAX_RANK and 0 < self.lora_alpha <= json_files.MAX_INT):
            raise PlanError(
                f"r is {self.base_rank} and lora_alpha is {self.lora_alpha}; expected positive numbers, r no more "
                f"than {MAX_RANK}."
            )
        for site, rank in zip(self.sites, self.ranks, strict=True):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise PlanError(f"The rank of {site.name} is {rank!r}; expected a whole number of at least 1.")
            if site.parameters_per_rank < 1 or site.max_rank == 0:
                raise PlanError(f"One rank of {site.name} costs {site.parameters_per_rank} parameters; expected some.")
            if rank > MAX_RANK:
                raise PlanError(f"The rank of {site.name} is {rank!s:.80}; expected no more than {MAX_RANK}.")
        if not 1 <= self.min_rank <= MAX_RANK:
            raise PlanError(f"min_rank is {self.min_rank!r:.80}; expected a whole number from 1 to {MAX_RANK}.")
        if not (1 <= self.total_rank <= MAX_RANK if self.total_rank is not None else self.rank_rule is None):
            raise PlanError(f"total_rank is {self.total_rank!r:.80}; expected a whole number from 1 to {MAX_RANK}.")
        if self.scaling_rule not in SCALINGS:
            raise PlanError(f"The scaling rule is {self.scaling_rule!r:.80}; expected one of: {', '.join(SCALINGS)}.")
        if len({site.name for site in self.sites}) != len(self.sites):
            raise PlanError("Two sites of a plan have the same name.")
        blocks = {block.name for block in self.profile.layout.blocks}
        unknown = [site.name for site in self.sites if site.name not in blocks]
        if unknown:
            raise PlanError(f"The sites {', '.join(unknown)} are not blocks of the profile that the plan came from.")
        if len(self.rank_changes) not in (0, len(self.sites)):
            raise PlanError(f"A plan has {len(self.rank_changes)} rank changes for {len(self.sites)} sites.")
        for share in self.rank_changes:
            if not (json_files.is_number(share) and 0 <= share <= 1):
                raise PlanError(f"A rank change is {share!r:.80}; expected a share of redraws, 0 to 1.")

    def __repr__(self) -> str:
        """Short, for a prompt or a notebook; `to_dict` has all of it."""
        return (
            f"<RankPlan {printable(self.policy)}: {len(self.ranks)} ranks, {min(self.ranks)} to {max(self.ranks)}; "
            f"{self.num_parameters:,} parameters, {self.num_base_parameters:,} at r = {self.base_rank}>"
        )

    def __str__(self) -> str:
        """Totals, and one line for each site; the report has the whole table."""
        width = max(len(printable(site.name)) for site in self.sites)
        ranks = (f"{printable(s.name):<{width}}  {rank}\n" for s, rank in zip(self.sites, self.ranks, strict=True))
        return f"{self._totals()}\n" + "".join(ranks)

    def _repr_html_(self) -> str:
        """The same as a table, which a notebook shows."""
        rows = [
            (site.name, str(rank), f"{rank * site.parameters_per_rank:,}")
            for site, rank in zip(self.sites, self.ranks, strict=True)
        ]
        return html_table(self._totals(), ("block", "rank", "parameters"), rows)

    def _totals(self) -> str:
        return (
            f"LoRA ranks by the policy {printable(self.policy)}: {self.num_parameters:,} parameters, "
            f"{self.num_base_parameters:,} at r = {self.base_rank}. {self.scaling_note()}{self.total_note()}"
        )

    def total_note(self) -> str:
        """One sentence on what chose the total, with a space before it; empty where it is the user's own `r`."""
        by = f", by the rule {printable(self.rank_rule)}" if self.rank_rule else ""
        return f" In all what r = {self.total_rank} costs{by}." if self.total_rank else ""

    def plot(self) -> Any:
        """The picture of the plan, a `matplotlib.figure.Figure`: dimensions above, ranks below. A notebook shows it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plugin_manager().hook.draw_plan(plan=self)

    def full_sites(self) -> tuple[Site, ...]:
        """The sites that got the largest rank which their matrices can hold, and more than `base_rank`."""
        pairs = zip(self.sites, self.ranks, strict=True)
        return tuple(site for site, rank in pairs if rank > self.base_rank and rank == site.max_rank)

    @property
    def num_parameters(self) -> int:
        """LoRA parameters of all sites with the chosen ranks."""
        return sum(rank * site.parameters_per_rank for rank, site in zip(self.ranks, self.sites, strict=True))

    @property
    def num_base_parameters(self) -> int:
        """LoRA parameters of all sites with `base_rank` everywhere."""
        return self.base_rank * sum(site.parameters_per_rank for site in self.sites)

    @property
    def scaling(self) -> float:
        """The factor on B A x at a site of `base_rank`; see `scaling_of`."""
        return self.lora_alpha / (math.sqrt(self.base_rank) if self.use_rslora else self.base_rank)

    def scaling_of(self, rank: int) -> float:
        """The factor on B A x at a site of `rank`.

        A step of AdamW moves B A by about the learning rate times the scaling times the rank, as each of the ranks adds
        its share. "equal_step" keeps that product, and "constant" the factor, as GeLoRA was published.
        """
        return self.scaling * self.base_rank / rank if self.scaling_rule == "equal_step" else self.scaling

    def scaling_note(self) -> str:
        """One sentence on the scaling."""
        if self.scaling_rule == "constant":
            return f"Scaling {self.scaling:g} everywhere."
        low, high = self.scaling_of(max(self.ranks)), self.scaling_of(min(self.ranks))
        return f"Scaling {low:g} to {high:g}: one over the rank, so that steps are as large at every rank."

    def alpha(self, rank: int) -> float:
        """lora_alpha for a module of `rank`; an int where it is whole."""
        constant, share = self.scaling_rule == "constant", rank / self.base_rank
        if self.use_rslora:
            alpha = self.lora_alpha * math.sqrt(share if constant else 1 / share)
        else:
            alpha = self.lora_alpha * rank / self.base_rank if constant else self.lora_alpha
        return int(alpha) if alpha == int(alpha) else alpha

    def rank_pattern(self) -> dict[str, int]:
        """`LoraConfig.rank_pattern`: one key per site."""
        return {site.pattern: rank for site, rank in zip(self.sites, self.ranks, strict=True)}

    def alpha_pattern(self) -> dict[str, float]:
        """`LoraConfig.alpha_pattern`, for the same keys."""
        return {site.pattern: self.alpha(rank) for site, rank in zip(self.sites, self.ranks, strict=True)}

    def lora_config_kwargs(self) -> dict[str, Any]:
        """Arguments for `peft.LoraConfig` of a model that has no adapter yet: `LoraConfig(**these, ...)`."""
        return {
            "r": self.base_rank,
            "lora_alpha": self.alpha(self.base_rank),
            "use_rslora": self.use_rslora,
            "rank_pattern": self.rank_pattern(),
            "alpha_pattern": self.alpha_pattern(),
        }

    def followed(self) -> dict[str, Any]:
        """The options that the ranks follow; those of the measurement were not all recorded from the start."""
        profile = self.profile
        return {
            **(profile.options or {}),
            "policy": self.policy,
            "rounding": self.rounding,
            "min_rank": self.min_rank,
            "scaling": self.scaling_rule,
            "rank": self.rank_rule or self.total_rank,
            "estimator": profile.estimator,
            "pooling": profile.pooling,
            "probe_seed": profile.seed,
            "standardise": profile.standardise,
            "target_std_error": profile.target_std_error,
        }

    def check_sites(self, sites: tuple[Site, ...]) -> None:
        """Raises PlanError, with the first difference, unless the plan is for exactly these sites."""
        mine = {site.name: site.parameters_per_rank for site in self.sites}
        theirs = {site.name: site.parameters_per_rank for site in sites}
        for name in [*mine, *theirs]:
            if mine.get(name) != theirs.get(name):
                raise PlanError(
                    f"The plan is for another model, or for other target modules: one rank of {name} costs "
                    f"{mine.get(name, 'nothing')} parameters in the plan and {theirs.get(name, 'nothing')} in the "
                    f"model.{_other_prefix(list(mine), list(theirs))} Make a plan for this model and these target "
                    "modules."
                )
        for site, rank in zip(self.sites, self.ranks, strict=True):
            # Beyond that a rank adds nothing to any of them, and the matrices may not fit into memory.
            most = max(site.parameters_per_rank, self.base_rank)
            if rank > most:
                raise PlanError(
                    f"The rank of {site.name} is {rank}; its matrices have no more than {most} rows and columns "
                    "together. Make the plan again."
                )

    def check_scaling(self, r: int, lora_alpha: float, use_rslora: bool) -> None:
        """Raises PlanError unless the plan keeps the scaling of a LoRA configuration with these values.

        Modules outside the plan, and servers that read one global alpha / r, go by the configuration.
        """
        theirs = lora_alpha / (math.sqrt(r) if use_rslora else r)
        if use_rslora != self.use_rslora or not math.isclose(theirs, self.scaling, rel_tol=1e-9):
            raise PlanError(
                f"The plan keeps the scaling {self.scaling:g} (r {self.base_rank}, lora_alpha {self.lora_alpha:g}, "
                f"use_rslora {self.use_rslora}), and the LoRA configuration has {theirs:g} (r {r}, lora_alpha "
                f"{lora_alpha:g}, use_rslora {use_rslora}). Make the plan again with the configuration's values."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all."""
        json_files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Raises PlanError, with the path, when the file is missing or damaged."""
        data = json_files.read_json(path)
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{os.fspath(path)} is no usable rank plan: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, with the schema number."""
        return {
            "schema": json_files.SCHEMA,
            "kind": "rank_plan",
            **asdict(self),
            "profile": self.profile.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of `to_dict`. Raises PlanError when a value is missing, of the wrong type or out of range."""
        get = json_files.reader(data, "plan", kind="rank_plan", keys=[field.name for field in fields(cls)])
        min_rank, scaling_rule = get("min_rank", int, since=True), get("scaling_rule", str, since=True)
        return cls(
            sites=tuple(_site_from_dict(site) for site in get("sites", list)),
            ranks=tuple(get("ranks", list)),
            base_rank=get("base_rank", int),
            lora_alpha=get("lora_alpha", float),
            use_rslora=get("use_rslora", bool),
            policy=get("policy", str),
            rounding=get("rounding", str),
            profile=DimensionProfile.from_dict(get("profile", dict)),
            rank_changes=tuple(get("rank_changes", list)),
            min_rank=1 if min_rank is None else min_rank,
            scaling_rule="constant" if scaling_rule is None else scaling_rule,
            total_rank=get("total_rank", int, null=True, since=True),
            rank_rule=get("rank_rule", str, null=True, since=True),
        )


def _site_from_dict(data: Mapping[str, Any]) -> Site:
    get = json_files.reader(data, "site", keys=[field.name for field in fields(Site)])
    return Site(get("name", str), get("parameters_per_rank", int), get("max_rank", int, null=True, since=True))


def _other_prefix(mine: Sequence[str], theirs: Sequence[str]) -> str:
    """What to say where the blocks of a plan and of a model differ in how their names begin, and in nothing else."""
    for longer, shorter, whose in ((theirs, mine, "the model's"), (mine, theirs, "the plan's")):
        prefix = longer[0].removesuffix(shorter[0]) if longer and shorter else ""
        if prefix and list(longer) == [prefix + name for name in shorter]:
            return (
                f" All that differs is the beginning of the names: {whose} have {prefix!r} before {shorter[0]!r}, as "
                "when one is the other with a head around it."
            )
    return ""
