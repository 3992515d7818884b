"""`gelora report`: a plan, shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gelora_plugins.cli.shown import show


def report(
    plan: Annotated[Path, typer.Argument(help="What gelora plan, or a training, wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for report.md, report.json and ranks.png.")
    ] = None,
) -> None:
    """Show: the table of a plan, and with -o the files."""
    from gelora_plugins.ranks.plan import RankPlan
    from gelora_plugins.report.rank_report import RankReport

    loaded = RankPlan.load(plan)
    show(loaded)
    if output is not None:
        for path in RankReport(loaded).write(output):
            typer.echo(f"-> {path}")
