"""How the plan changes with every choice that the paper leaves open: one forward pass per document for all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gelora_plugins import json_files, plugins
from gelora_plugins.config import ROUNDINGS, GeLoRAConfig
from gelora_plugins.dimension.measure import estimate_dimensions
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.errors import GeLoRAError, ProbeError
from gelora_plugins.plugins import find_layout
from gelora_plugins.probe.documents import Collator, choose_documents
from gelora_plugins.probe.find_blocks import unwrap
from gelora_plugins.probe.hidden_states import Pooling, read_documents
from gelora_plugins.probe.model_inputs import accepted_inputs
from gelora_plugins.probe.no_trace import leaving_no_trace
from gelora_plugins.probe.point_store import FeatureStore
from gelora_plugins.probe.progress import progress_bar
from gelora_plugins.probe.provenance import origin
from gelora_plugins.ranks.plan import Site, layout_sites
from gelora_plugins.ranks.policies import check_dimensions
from gelora_plugins.text import printable

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

POLICIES = ("gelora", "budget")


@dataclass(frozen=True)
class Setting:
    """One way to measure and choose.

    Attributes:
        name: what differs from the chosen setting, for the table.
        estimator, pooling, rounding, standardise: as in GeLoRAConfig.
        share: the share of the documents that is measured, 1 for all.
        draw: which choice of that share; no two draws are the same.
    """

    name: str
    estimator: str
    pooling: str
    rounding: str
    standardise: bool
    share: float = 1.0
    draw: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a setting gives.

    Attributes:
        setting: the setting.
        ranks: for each of POLICIES one rank per site; empty where the setting cannot be measured.
        correlation: Spearman's rank correlation of the growths with those of the chosen setting; None where there is
            none (a growth that is the same at every block, say).
        reason: why the setting cannot be measured; empty where it can.
    """

    setting: Setting
    ranks: dict[str, tuple[int, ...]]
    correlation: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """The chosen setting and the others beside it.

    Attributes:
        profile: the chosen setting's, as `measure` would give it with all of `probe_samples`.
        outcomes: one per setting; the first is the chosen one.
        base_rank: what the policy `budget` spends.
    """

    profile: DimensionProfile
    outcomes: tuple[Outcome, ...]
    base_rank: int

    def __str__(self) -> str:
        from gelora_plugins.report.table import render

        return render(self.table())

    def summary(self, outcome: Outcome, policy: str) -> dict[str, float]:
        """Mean, lowest and highest rank; at how many blocks it differs from the chosen setting's, and by how much."""
        ranks, chosen = outcome.ranks[policy], self.outcomes[0].ranks[policy]
        differences = [abs(a - b) for a, b in zip(ranks, chosen, strict=True)]
        return {
            "mean": sum(ranks) / len(ranks),
            "lowest": min(ranks),
            "highest": max(ranks),
            "blocks_that_differ": sum(map(bool, differences)),
            "mean_difference": sum(differences) / len(ranks),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values: ranks and summaries of every setting, and the profile of the chosen one."""
        return {
            "schema": json_files.SCHEMA,
            "kind": "sensitivity",
            "base_rank": self.base_rank,
            "outcomes": [
                {**asdict(outcome), "summary": {policy: self.summary(outcome, policy) for policy in outcome.ranks}}
                for outcome in self.outcomes
            ],
            "profile": self.profile.to_dict(),
        }

    def table(self) -> Table:
        """One line per setting: for each policy the ranks' mean and range, and the difference from the first line."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        title = "How the plan depends on the setting\n"
        table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False)
        table.add_column("setting", no_wrap=True)
        table.add_column("growth\ncorr.", justify="right", no_wrap=True)
        for column in ("gelora\nmean", "\nrange", "\ndiffer", "\nby", "budget\nrange", "\ndiffer", "\nby"):
            table.add_column(column, justify="right", no_wrap=True)
        for outcome in self.outcomes:
            correlation = "-" if outcome.correlation is None else f"{outcome.correlation:.2f}"
            cells = [cell for policy in outcome.ranks for cell in _cells(self.summary(outcome, policy))]
            name = Text(printable(outcome.setting.name))
            table.add_row(name, correlation, *cells[:4], *cells[5:])  # the mean is the budget
        return table

    def lines(self) -> list[str]:
        """What the columns mean, and which settings could not be measured."""
        sites = len(self.outcomes[0].ranks[POLICIES[0]])
        return [
            f"budget: at r = {self.base_rank}, its mean. differ: at how many of {sites} blocks the rank is not the one "
            "of the first line; by: the mean absolute difference. growth corr.: Spearman's correlation of the growths "
            "with those of the first line.",
            *(f"{outcome.setting.name}: {outcome.reason}" for outcome in self.outcomes if outcome.reason),
        ]


def measure_sensitivity(
    model: nn.Module,
    dataset: Any,
    config: GeLoRAConfig | None = None,
    *,
    base_rank: int = 8,
    sites: Sequence[Site] | None = None,
    collator: Collator | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure `dataset` in `model` once, and choose ranks in every setting of `settings`. The model is left as it was.

    Args:
        model, dataset, collator, progress: as for `measure`.
        config: the chosen setting; all of `probe_samples` is read, whatever `target_std_error` says.
        base_rank: `r` of the policy `budget`.
        sites: where ranks apply; by default every linear map of the blocks is a target module.

    Raises:
        GeLoRAError: the chosen setting cannot be measured. Another setting that cannot says so in its outcome.
    """
    started = time.perf_counter()
    config = replace(config or GeLoRAConfig(), target_std_error=None)
    for kind in ("estimator", "pooling"):
        plugins.find(kind, getattr(config, kind))
    layout = find_layout(model)
    sites = tuple(sites or layout_sites(layout, lambda path: True))
    root = unwrap(model)
    with leaving_no_trace(model):
        probe_set = choose_documents(dataset, config, root.config, collator, accepted_inputs(root, layout))
    num_documents = len(probe_set.documents)
    poolings = _Poolings(plugins.available("pooling"))
    chosen, *others = settings(config)
    with FeatureStore(config.feature_storage, num_documents) as points:
        num_tokens = read_documents(model, layout, probe_set, poolings, points, config, progress=progress)

        facts = {
            **origin(model, layout),
            "seed": config.probe_seed,
            "num_repeated_inputs": probe_set.num_repeats,
            "num_tokens": num_tokens,
            "data_fingerprint": probe_set.fingerprint(),
            "num_rows": probe_set.num_rows,
            "num_targets": probe_set.num_targets,
        }
        measured = partial(_profile, config, points, poolings, started, facts)
        profile = measured(chosen)
        outcomes = [_outcome(chosen, profile, profile, sites, base_rank)]
        bar = progress_bar(others, total=len(others), desc="GeLoRA settings", unit="setting", shown=progress)
        for setting in bar:
            try:
                known = replace(setting, name=chosen.name, rounding=chosen.rounding) == chosen
                outcomes.append(_outcome(setting, profile if known else measured(setting), profile, sites, base_rank))
            except GeLoRAError as error:
                outcomes.append(Outcome(setting, ranks={}, reason=str(error)))
    return Sensitivity(profile, tuple(outcomes), base_rank)


def settings(config: GeLoRAConfig) -> list[Setting]:
    """The chosen setting of `config`, and those that differ from it in one thing: every estimator and pooling that is
    registered, every rounding, standardised or not, and halves and a quarter of the documents."""
    chosen = Setting("as chosen", config.estimator, config.pooling, config.rounding, config.standardise)
    choices: dict[str, Sequence[Any]] = {
        "estimator": sorted(plugins.available("estimator")),
        "pooling": sorted(plugins.available("pooling")),
        "rounding": ROUNDINGS,
    }
    return [
        chosen,
        *(
            replace(chosen, name=f"{option} {value}", **{option: value})
            for option, values in choices.items()
            for value in values
            if value != getattr(config, option)
        ),
        replace(chosen, name=f"{'not ' * config.standardise}standardised", standardise=not config.standardise),
        *(replace(chosen, name=f"half the documents, {draw}", share=1 / 2, draw=draw) for draw in (1, 2, 3)),
        replace(chosen, name="quarter of documents", share=1 / 4, draw=4),
    ]


class _Poolings:
    """All poolings as one: their points side by side. A pooling: (hidden, mask) -> (documents, features)."""

    def __init__(self, poolings: dict[str, Pooling]) -> None:
        self.poolings = poolings
        self.widths: dict[int, list[int]] = {}  # of the poolings, by their sum, which differs where blocks are wider

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        parts = [pooling(hidden, mask).float() for pooling in self.poolings.values()]
        for name, part in zip(self.poolings, parts, strict=True):
            if part.dim() != 2 or len(part) != len(mask):
                raise ProbeError(
                    f"The pooling {name!r} made points of shape {tuple(part.shape)} of {len(mask)} documents; expected "
                    "(documents, features)."
                )
        widths = [part.shape[1] for part in parts]
        if self.widths.setdefault(sum(widths), widths) != widths:
            raise ProbeError(f"The poolings {', '.join(self.poolings)} make points of varying width; expected one.")
        return torch.cat(parts, dim=1)

    def part(self, points: Tensor, name: str) -> Tensor:
        """The columns of `points` (documents, features of all) that the pooling `name` made."""
        widths, i = self.widths[points.shape[1]], list(self.poolings).index(name)
        return points.narrow(1, sum(widths[:i]), widths[i])


class _Points(Sequence[Tensor]):
    """The points of one pooling and some documents at every boundary, cut out when asked for: (rows, features)."""

    def __init__(self, points: Sequence[Tensor], poolings: _Poolings, name: str, rows: Tensor) -> None:
        self.points, self.poolings, self.name, self.rows = points, poolings, name, rows

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, boundary: Any) -> Any:
        return self.poolings.part(self.points[boundary], self.name)[self.rows]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[boundary] for boundary in range(len(self)))


def _profile(
    config: GeLoRAConfig,
    points: FeatureStore,
    poolings: _Poolings,
    started: float,
    facts: dict[str, Any],
    setting: Setting,
) -> DimensionProfile:
    """The profile in one setting; `facts` are what all settings share, `started` is when the first began."""
    how: dict[str, Any] = {
        "estimator": setting.estimator,
        "pooling": setting.pooling,
        "standardise": setting.standardise,
    }
    rows = _rows(points.num_filled, setting, facts["seed"])
    estimates, num_repeated_points = estimate_dimensions(
        _Points(points, poolings, setting.pooling, rows),
        plugins.find("estimator", setting.estimator),
        standardise=setting.standardise,
        seed=facts["seed"],
    )
    profile = DimensionProfile(
        estimates=estimates,
        num_documents=len(rows),
        num_repeated_points=num_repeated_points,
        seconds=time.perf_counter() - started,
        options=replace(config, **how, rounding=setting.rounding).measured(),
        **how,
        **facts,
    )
    check_dimensions(profile)
    return profile


def _rows(num_documents: int, setting: Setting, seed: int) -> Tensor:
    """Which documents a setting measures, ascending."""
    count = round(setting.share * num_documents)
    rng = random.Random(f"{seed} {setting.draw}")
    return torch.tensor(sorted(rng.sample(range(num_documents), count)), dtype=torch.long)


def _outcome(
    setting: Setting, profile: DimensionProfile, chosen: DimensionProfile, sites: Sequence[Site], base_rank: int
) -> Outcome:
    config = GeLoRAConfig(rounding=setting.rounding)
    ranks = {name: tuple(plugins.find("policy", name)(profile, sites, base_rank, config)) for name in POLICIES}
    return Outcome(setting, ranks, _correlation(profile.growth(), chosen.growth()))


def _correlation(growth: Sequence[float | None], chosen: Sequence[float | None]) -> float | None:
    """Spearman's rank correlation over the blocks where both are known."""
    from scipy.stats import spearmanr

    pairs = [(a, b) for a, b in zip(growth, chosen, strict=True) if a is not None and b is not None]
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def _cells(summary: dict[str, float]) -> tuple[str, ...]:
    return (
        f"{summary['mean']:.2f}",
        f"{summary['lowest']}-{summary['highest']}",
        str(summary["blocks_that_differ"]),
        f"{summary['mean_difference']:.2f}",
    )
