"""What is shown and kept: RankReport as a table, JSON, Markdown and a picture. Needs no torch."""

from __future__ import annotations

import importlib.util
import io
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gelora_plugins import records

if TYPE_CHECKING:
    import os

    from rich.table import Table

    from gelora_plugins.ranks import RankPlan

_PACKAGES = ("gelora", "torch", "transformers", "peft", "trl", "axolotl")
_COLUMNS = ("block", "dimension in", "dimension out", "rank", "parameters")


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
        return render(plan_table(self.plan)) + "".join(f"{line}\n" for line in self.lines())

    def lines(self) -> list[str]:
        """Totals, cost and notes, one sentence each."""
        plan, profile = self.plan, self.plan.profile
        share = plan.num_parameters / plan.num_base_parameters
        lines = [
            f"LoRA parameters in the blocks: {plan.num_base_parameters:,} at r = {plan.base_rank}, "
            f"{plan.num_parameters:,} as planned ({share:.0%}). Scaling {plan.scaling:g} everywhere.",
            f"Policy {plan.policy}, estimator {profile.estimator}, pooling {profile.pooling}. Measured on "
            f"{profile.num_documents:,} documents, {profile.num_tokens:,} tokens, in {profile.seconds:.1f} s.",
        ]
        if self.trainable_before is not None and self.trainable_after is not None:
            lines.append(f"Trainable parameters: {self.trainable_before:,} before, {self.trainable_after:,} after.")
        return lines + list(profile.notes())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values: the plan, the totals, and the versions of the packages that made it."""
        return {
            "schema": records.SCHEMA,
            "kind": "rank_report",
            "plan": self.plan.to_dict(),
            "lora_parameters": {"uniform": self.plan.num_base_parameters, "planned": self.plan.num_parameters},
            "trainable_parameters": {"before": self.trainable_before, "after": self.trainable_after},
            "notes": list(self.plan.profile.notes()),
            "versions": versions(),
        }

    def to_markdown(self) -> str:
        """The table and the lines below it."""
        rows = [_COLUMNS, tuple("---" for _ in _COLUMNS), *_rows(self.plan)]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        return f"# LoRA ranks by GeLoRA\n\n{table}\n\n" + "".join(f"{line}\n\n" for line in self.lines())

    def write(self, output_dir: str | os.PathLike[str]) -> list[Path]:
        """Write plan.json, report.json, report.md and, where matplotlib is installed, ranks.png; return the paths."""
        directory = Path(output_dir)
        self.plan.save(directory / "plan.json")
        records.write_json(directory / "report.json", self.to_dict())
        records.write_text(directory / "report.md", self.to_markdown())
        paths = [directory / name for name in ("plan.json", "report.json", "report.md")]
        if importlib.util.find_spec("matplotlib") is not None:
            paths.append(directory / "ranks.png")
            draw(self.plan, paths[-1])
        return paths


def versions() -> dict[str, str]:
    """Python, and the packages of this project that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _rows(plan: RankPlan) -> list[tuple[str, ...]]:
    profile = plan.profile
    at = dict(zip((block.name for block in profile.layout.blocks), profile.layout.block_boundaries(), strict=True))
    rows: list[tuple[str, ...]] = []
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        before, after = at[site.name]
        rows.append(
            (
                site.name,
                str(profile.estimates[before]),
                str(profile.estimates[after]),
                str(rank),
                f"{rank * site.parameters_per_rank:,}",
            )
        )
    return rows


def plan_table(plan: RankPlan) -> Table:
    """The plan as a rich table: block, dimension in and out with interval, rank, LoRA parameters."""
    from rich import box
    from rich.table import Table

    table = Table(title="LoRA ranks by GeLoRA", box=box.SIMPLE_HEAD)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "block" else "right", no_wrap=column != "block")
    for row in _rows(plan):
        table.add_row(*row)
    table.add_section()
    mean = sum(plan.ranks) / len(plan.ranks)
    table.add_row("all (mean rank)", "", "", f"{mean:.2f}", f"{plan.num_parameters:,}")
    return table


def render(table: Table) -> str:
    """A rich table as plain text."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=120, color_system=None).print(table)
    return text.getvalue()


def draw(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """The dimension at every boundary with its interval above, the ranks below, as PNG, SVG or PDF by the suffix.

    Raises:
        ImportError: matplotlib is not installed (`pip install "gelora[plot]"`).
    """
    from matplotlib.figure import Figure  # no pyplot: no window, no global state, whatever backend the user has

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    profile = plan.profile
    first = 0
    for stack in profile.layout.stacks:
        boundaries = range(first, first + len(stack) + 1)
        known = [(b, e) for b in boundaries if (e := profile.estimates[b]).value is not None]
        x = [b - 0.5 for b, _ in known]
        above.plot(x, [e.value for _, e in known], color="tab:blue", marker="o", markersize=3)
        intervals = [(b - 0.5, *e.interval) for b, e in known if e.interval is not None]
        if intervals:
            above.fill_between(*zip(*intervals, strict=True), color="tab:blue", alpha=0.2, linewidth=0)
        first += len(stack) + 1
    at = dict(zip((b.name for b in profile.layout.blocks), profile.layout.block_boundaries(), strict=True))
    below.bar([at[site.name][0] for site in plan.sites], plan.ranks, color="tab:orange", width=0.8)
    below.axhline(plan.base_rank, color="gray", linestyle="--", linewidth=1)
    below.text(1.0, plan.base_rank, f" r = {plan.base_rank}", transform=below.get_yaxis_transform(), color="gray")
    below.yaxis.get_major_locator().set_params(integer=True)
    above.set_ylabel("intrinsic dimension")
    above.set_title(
        f"{profile.layout.model_type}: {profile.num_documents} documents, {profile.pooling} pooling, "
        f"{profile.estimator}; ranks by {plan.policy}"
    )
    below.set_ylabel("LoRA rank")
    below.set_xlabel("block (each boundary lies between two blocks)")
    figure.savefig(path, dpi=120)
