"""Tables and sentences on standard output. Heavy imports stand inside the functions."""

from __future__ import annotations

from typing import Any

import typer

from gelora_plugins.text import printable


def show(plan: Any) -> None:
    """The table of a plan, and the sentences below it."""
    from gelora_plugins.report.rank_report import RankReport

    typer.echo(RankReport(plan))


def print_table(table: Any, lines: list[str]) -> None:
    """A rich table, and sentences below it."""
    from gelora_plugins.report.table import render

    typer.echo(render(table))
    for line in lines:
        typer.echo(printable(line))
