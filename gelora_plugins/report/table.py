"""The table of a plan, for a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from gelora_plugins.text import printable

if TYPE_CHECKING:
    from rich.table import Table

    from gelora_plugins.ranks.plan import RankPlan

COLUMNS = ("block", "dimension in", "dimension out", "rank", "may differ", "parameters")


def cells(plan: RankPlan) -> list[tuple[str, ...]]:
    """What stands in COLUMNS, one line for each site."""
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
    for column in COLUMNS:
        head = column.replace(" ", "\n")  # narrow: with names of 15 letters a line has less than 80 columns
        table.add_column(head, justify="left" if column == "block" else "right", no_wrap=True)
    for row in cells(plan):
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
