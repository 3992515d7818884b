"""The extension points. A plugin is an object with some of these hooks, under the entry point group `gelora`."""

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.figure import Figure
    from torch import nn

    from gelora_plugins.layout import ModelLayout
    from gelora_plugins.ranks.plan import RankPlan
    from gelora_plugins.report.rank_report import RankReport

hookspec = pluggy.HookspecMarker("gelora")
hookimpl = pluggy.HookimplMarker("gelora")


@hookspec
def register_estimators() -> "Mapping[str, Callable[..., Any]]":
    """Estimators of intrinsic dimension by name: distinct points (n, D) float32 -> DimensionEstimate."""


@hookspec
def register_poolings() -> "Mapping[str, Callable[..., Any]]":
    """Poolings by name: hidden (documents, tokens, features), mask (documents, tokens) -> (documents, features)."""


@hookspec
def register_rank_policies() -> "Mapping[str, Callable[..., Any]]":
    """Rank policies by name: profile, sites, base_rank, config -> one rank of at least 1 per site."""


@hookspec
def register_rank_rules() -> "Mapping[str, Callable[..., Any]]":
    """Rules for the total by name: profile, sites, base_rank -> the rank whose cost at every block a policy spends."""


@hookspec
def register_training_methods() -> "Mapping[str, Callable[..., Any]]":
    """Training methods by name: options -> `gelora_plugins.methods.base.TrainingMethod`, a TrainerCallback."""


@hookspec(firstresult=True)
def find_model_layout(model: "nn.Module") -> "ModelLayout | None":
    """The transformer blocks of `model`, or None when this plugin does not know it."""


@hookspec(firstresult=True)
def draw_plan(plan: "RankPlan") -> "Figure | None":
    """The picture of a plan that `RankPlan.plot` gives, or None to leave it to the next plugin."""


@hookspec
def write_report(report: "RankReport", output_dir: str) -> None:
    """A report is ready: write it below `output_dir`, or send it on. Called in the main process only."""
