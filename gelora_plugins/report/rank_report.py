"""What is shown and kept: RankReport as a table, JSON, Markdown and a picture. Needs no torch."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gelora_plugins import json_files
from gelora_plugins.text import label, markdown, printable

if TYPE_CHECKING:
    from rich.table import Table

    from gelora_plugins.dimension.profile import DimensionProfile
    from gelora_plugins.ranks.plan import RankPlan

logger = logging.getLogger(__name__)

_PACKAGES = ("gelora", "torch", "transformers", "peft", "trl", "axolotl")
_COLUMNS = ("block", "dimension in", "dimension out", "rank", "may differ", "parameters")
_UNSURE = 0.05  # a rank that changes in more redraws than this counts as unsure


@dataclass(frozen=True)
class RankReport:
    """A plan, and what it did to a model.

    Attributes:
        plan: the ranks and what they were chosen from.
        trainable_before, trainable_after: trainable parameters of the whole model; None where no model was changed.
    """

    plan: RankPlan
    trainable_before: int | None = None
    trainable_after: int | None = None

    def __str__(self) -> str:
        return render(plan_table(self.plan)) + "\n" + "".join(f"{line}\n" for line in self.lines())

    def lines(self) -> list[str]:
        """Totals, cost and notes, one sentence each."""
        plan, profile = self.plan, self.plan.profile
        share = plan.num_parameters / plan.num_base_parameters
        lines = [
            f"LoRA parameters in the blocks: {plan.num_base_parameters:,} at r = {plan.base_rank}, "
            f"{plan.num_parameters:,} as planned ({share:.0%}). Scaling {plan.scaling:g} everywhere.",
            f"Policy {plan.policy}, estimator {profile.estimator}, pooling {profile.pooling}"
            f"{', coordinates standardised' if profile.standardise else ''}. Measured on "
            f"{profile.num_documents:,} documents, {profile.num_tokens:,} tokens, in {profile.seconds:.1f} s.",
            *_fullness(plan),
            *_sureness(plan),
        ]
        if self.trainable_before is not None and self.trainable_after is not None:
            lines.append(f"Trainable parameters: {self.trainable_before:,} before, {self.trainable_after:,} after.")
        return [printable(line) for line in (*lines, *profile.notes())]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values: the plan, the totals, and the versions of the packages that made it."""
        return {
            "schema": json_files.SCHEMA,
            "kind": "rank_report",
            "plan": self.plan.to_dict(),
            "lora_parameters": {"uniform": self.plan.num_base_parameters, "planned": self.plan.num_parameters},
            "trainable_parameters": {"before": self.trainable_before, "after": self.trainable_after},
            "notes": list(self.plan.profile.notes()),
            "versions": versions(),
        }

    def to_markdown(self) -> str:
        """The table and the lines below it."""
        rows = [_COLUMNS, tuple("---" for _ in _COLUMNS)]
        rows += [(markdown(name), *numbers) for name, *numbers in _rows(self.plan)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"# LoRA ranks by GeLoRA\n\n{table}\n\n" + "".join(f"{markdown(line)}\n\n" for line in self.lines())

    def write(self, output_dir: str | os.PathLike[str]) -> list[Path]:
        """Write plan.json, report.json, report.md and, where matplotlib is installed, ranks.png; return the paths."""
        directory = Path(output_dir)
        self.plan.save(directory / "plan.json")
        json_files.write_json(directory / "report.json", self.to_dict())
        json_files.write_text(directory / "report.md", self.to_markdown())
        paths = [directory / name for name in ("plan.json", "report.json", "report.md")]
        if importlib.util.find_spec("matplotlib") is not None:
            paths.append(directory / "ranks.png")
            draw(self.plan, paths[-1])
        return paths


def show(report: RankReport) -> None:
    """Print a report. What the encoding of standard output lacks, such as the lines of the table, is replaced."""
    text = str(report)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("─", "-").encode(encoding, "replace").decode(encoding)
    print(text, flush=True)


def write_reports(report: RankReport, output_dir: str | os.PathLike[str]) -> None:
    """Write the files, then tell every plugin that has `write_report`. A plugin that fails is a warning.

    Raises:
        WriteError: the files cannot be written.
    """
    from gelora_plugins.plugins import BUILT_INS, plugin_manager

    manager = plugin_manager()
    plugins = {impl.plugin_name: impl.plugin for impl in manager.hook.write_report.get_hookimpls()}
    for name in sorted(plugins, key=lambda name: name != BUILT_INS):
        others = [plugin for plugin in manager.get_plugins() if plugin is not plugins[name]]
        try:
            manager.subset_hook_caller("write_report", others)(report=report, output_dir=os.fspath(output_dir))
        except Exception as error:
            if name == BUILT_INS:
                raise
            logger.warning(
                "write_report of the gelora plugin %r failed: %s: %s. The ranks and the files in %s are as they are to "
                "be.",
                name,
                type(error).__name__,
                error,
                os.fspath(output_dir),
            )


def versions() -> dict[str, str]:
    """Python, and the packages of this project that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _fullness(plan: RankPlan) -> list[str]:
    """Which ranks were held to what the matrices can hold, and what that leaves of a budget."""
    full = plan.full_sites()
    if not full:
        return []
    line = f"{len(full)} of {len(plan.sites)} blocks have the largest rank that a matrix in them can use."
    left = plan.num_base_parameters - plan.num_parameters
    if plan.policy == "budget" and left >= max(site.parameters_per_rank for site in plan.sites):
        line += f" {left:,} parameters of the budget could not be spent."
    return [line]


def _sureness(plan: RankPlan) -> list[str]:
    """How well the growths are known, and how much the ranks depend on the draw of the documents."""
    known = [error for error in plan.profile.growth_std_errors() if error is not None]
    if not known or not plan.rank_changes:
        return [
            f"The estimator {plan.profile.estimator} gives no standard errors: how sure the ranks are is not known."
        ]
    num_redraws = max(len(estimate.replicates) for estimate in plan.profile.estimates)
    unsure = sum(share > _UNSURE for share in plan.rank_changes)
    return [
        f"The growth over a block is known to a standard error of {min(known):.2f} to {max(known):.2f}.",
        f"May differ: the share of {num_redraws} redraws of the measured dimensions, from random halves of the "
        f"documents, in which the policy chooses another rank. It is above {_UNSURE:.0%} at {unsure} of "
        f"{len(plan.ranks)} blocks.",
    ]


def _rows(plan: RankPlan) -> list[tuple[str, ...]]:
    profile = plan.profile
    at = dict(zip((block.name for block in profile.layout.blocks), profile.layout.block_boundaries(), strict=True))
    rows: list[tuple[str, ...]] = []
    changes = plan.rank_changes or (None,) * len(plan.ranks)
    for site, rank, change in zip(plan.sites, plan.ranks, changes, strict=True):
        before, after = at[site.name]
        rows.append(
            (
                site.name,
                str(profile.estimates[before]),
                str(profile.estimates[after]),
                str(rank),
                "-" if change is None else f"{change:.0%}",
                f"{rank * site.parameters_per_rank:,}",
            )
        )
    return rows


def plan_table(plan: RankPlan) -> Table:
    """The plan as a rich table: block, dimension in and out with interval, rank and how sure it is, LoRA parameters."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="LoRA ranks by GeLoRA\n", box=box.SIMPLE_HEAD, show_edge=False, collapse_padding=True, pad_edge=False
    )
    for column in _COLUMNS:
        head = column.replace(" ", "\n")  # narrow: with names of 15 letters a line has less than 80 columns
        table.add_column(head, justify="left" if column == "block" else "right", no_wrap=True)
    for row in _rows(plan):
        table.add_row(*(Text(printable(cell)) for cell in row))
    table.add_section()
    mean = sum(plan.ranks) / len(plan.ranks)
    table.add_row("all (mean rank)", "", "", f"{mean:.2f}", "", f"{plan.num_parameters:,}")
    return table


def render(table: Table) -> str:
    """A rich table as plain text, as wide as its cells are: rich cuts names to fit a narrow terminal."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=10**6, color_system=None).print(table)
    return text.getvalue()


def draw(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """The dimension at every boundary with its interval above, the ranks below, as PNG, SVG or PDF by the suffix.

    A rank is the paler, the more of the redraws have another.

    Raises:
        ImportError: matplotlib is not installed (`pip install "gelora[plot]"`).
    """
    from matplotlib.figure import Figure  # no pyplot: no window, no global state, whatever backend the user has

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    profile = plan.profile
    _draw_dimensions(profile, above)
    _draw_ranks(plan, below)
    title = (
        f"{profile.layout.model_type}: {profile.num_documents} documents, {profile.pooling} pooling, "
        f"{profile.estimator}; ranks by {plan.policy}"
    )
    above.set_title(label(title))
    below.set_xlabel("block (each boundary lies between two blocks)")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=Path(path).suffix[1:], dpi=120)
    json_files.write_bytes(path, drawn.getvalue())


def _draw_dimensions(profile: DimensionProfile, axes: Any) -> None:
    first = 0
    for stack in profile.layout.stacks:
        boundaries = range(first, first + len(stack) + 1)
        known = [(b, e) for b in boundaries if (e := profile.estimates[b]).value is not None]
        x = [b - 0.5 for b, _ in known]
        axes.plot(x, [e.value for _, e in known], color="tab:blue", marker="o", markersize=3)
        intervals = [(b - 0.5, *e.interval) for b, e in known if e.interval is not None]
        if intervals:
            axes.fill_between(*zip(*intervals, strict=True), color="tab:blue", alpha=0.2, linewidth=0)
        first += len(stack) + 1
    axes.set_ylabel("intrinsic dimension")


def _draw_ranks(plan: RankPlan, axes: Any) -> None:
    at = dict(zip((b.name for b in plan.profile.layout.blocks), plan.profile.layout.block_boundaries(), strict=True))
    bars = axes.bar([at[site.name][0] for site in plan.sites], plan.ranks, color="tab:orange", width=0.8)
    for bar, change in zip(bars, plan.rank_changes, strict=bool(plan.rank_changes)):
        bar.set_alpha(_paleness(change))
    if plan.rank_changes:
        for change in (0.0, 0.5, 1.0):
            axes.bar(0, 0, color="tab:orange", alpha=_paleness(change), label=f"{change:.0%}")
        axes.legend(title="may differ", ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize="small")
    axes.axhline(plan.base_rank, color="gray", linestyle="--", linewidth=1)
    axes.text(1.0, plan.base_rank, f" r = {plan.base_rank}", transform=axes.get_yaxis_transform(), color="gray")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("LoRA rank")


def _paleness(change: float) -> float:
    return 1 - 0.75 * change
