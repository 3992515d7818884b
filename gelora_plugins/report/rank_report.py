"""What is shown and kept: RankReport as a table, JSON, Markdown and a picture. Needs no torch."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gelora_plugins import json_files
from gelora_plugins.plugins import BUILT_INS, plugin_manager
from gelora_plugins.ranks.guard import late_note
from gelora_plugins.ranks.verdict import SETTLED, verdict
from gelora_plugins.report.pictures import draw
from gelora_plugins.report.table import COLUMNS, cells, plan_table, render
from gelora_plugins.report.versions import versions
from gelora_plugins.report.web import page
from gelora_plugins.text import html_table, markdown, printable

if TYPE_CHECKING:
    from gelora_plugins.ranks.plan import RankPlan

logger = logging.getLogger(__name__)


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
        lines = "".join(f"{line}\n" for line in self.lines())
        return f"\n{printable(verdict(self.plan))}\n\n{render(plan_table(self.plan))}\n{lines}"

    def _repr_html_(self) -> str:
        """The verdict, the table and the lines below it, which a notebook shows."""
        table = html_table(verdict(self.plan), COLUMNS, cells(self.plan))
        return table + "".join(f"<p>{escape(line)}</p>" for line in self.lines())

    def lines(self) -> list[str]:
        """Totals, cost and notes, one sentence each."""
        plan, profile = self.plan, self.plan.profile
        share = plan.num_parameters / plan.num_base_parameters
        lines = [
            f"LoRA parameters in the blocks: {plan.num_base_parameters:,} at r = {plan.base_rank}, "
            f"{plan.num_parameters:,} as planned ({share:.0%}). {plan.scaling_note()}{plan.total_note()}",
            f"Policy {plan.policy}, estimator {profile.estimator}, pooling {profile.pooling}"
            f"{', coordinates standardised' if profile.standardise else ''}. Measured on "
            f"{profile.num_documents:,} documents, {profile.num_tokens:,} tokens, in {profile.seconds:.1f} s.",
            *_fullness(plan),
            *filter(None, [late_note(plan)]),
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
            "verdict": verdict(self.plan),
            "notes": list(self.plan.profile.notes()),
            "versions": versions(),
        }

    def to_markdown(self) -> str:
        """The table and the lines below it."""
        rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
        rows += [(markdown(name), *numbers) for name, *numbers in cells(self.plan)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        head = f"# LoRA ranks by GeLoRA\n\n{markdown(verdict(self.plan))}\n\n"
        return f"{head}{table}\n\n" + "".join(f"{markdown(line)}\n\n" for line in self.lines())

    def to_html(self) -> str:
        """All of it as one page that needs no network, no script and no other file."""
        return page(self)

    def write(self, output_dir: str | os.PathLike[str]) -> list[Path]:
        """Write plan.json, report.json, report.md, report.html and, where matplotlib is installed, ranks.png.

        Returns the paths.
        """
        directory = Path(output_dir)
        self.plan.save(directory / "plan.json")
        json_files.write_json(directory / "report.json", self.to_dict())
        json_files.write_text(directory / "report.md", self.to_markdown())
        json_files.write_text(directory / "report.html", self.to_html())
        paths = [directory / name for name in ("plan.json", "report.json", "report.md", "report.html")]
        if importlib.util.find_spec("matplotlib") is not None:
            paths.append(directory / "ranks.png")
            draw(self.plan, paths[-1])
        return paths


def scalars(plan: RankPlan) -> dict[str, float]:
    """What a plan comes to, in numbers for a tracker: whole where they count something.

    mean_rank; parameters_share, of LoRA parameters with the user's own `r`; blocks_unsure, whose rank changes in more
    than 5 % of redraws, where that is known; seconds of the measurement.
    """
    numbers = {
        "mean_rank": sum(plan.ranks) / len(plan.ranks),
        "parameters_share": plan.num_parameters / plan.num_base_parameters,
        "seconds": plan.profile.seconds,
    }
    return numbers | ({"blocks_unsure": _num_unsure(plan)} if plan.rank_changes else {})


def _num_unsure(plan: RankPlan) -> int:
    """Blocks whose rank changes in more than 5 % of redraws."""
    return sum(share > SETTLED for share in plan.rank_changes)


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


def _fullness(plan: RankPlan) -> list[str]:
    """Which ranks were held to what the matrices can hold, and what that leaves of a budget."""
    full = plan.full_sites()
    if not full:
        return []
    line = f"{len(full)} of {len(plan.sites)} blocks have the largest rank that a matrix in them can use."
    left = (plan.total_rank or plan.base_rank) * sum(site.parameters_per_rank for site in plan.sites)
    left -= plan.num_parameters
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
    return [
        f"The growth over a block is known to a standard error of {min(known):.2f} to {max(known):.2f}.",
        f"May differ: the share of {num_redraws} redraws of the measured dimensions, from random halves of the "
        f"documents, in which the policy chooses another rank. It is above {SETTLED:.0%} at {_num_unsure(plan)} of "
        f"{len(plan.ranks)} blocks.",
    ]
