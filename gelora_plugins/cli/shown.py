"""Tables, sentences and JSON on standard output. Heavy imports stand inside the functions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from gelora_plugins.text import printable


def show(plan: Any, as_json: bool = False) -> None:
    """The table of a plan and the sentences below it, or the whole report as JSON."""
    from gelora_plugins import json_files
    from gelora_plugins.report.rank_report import RankReport

    report = RankReport(plan)
    typer.echo(json_files.as_text(report.to_dict()) if as_json else report, nl=not as_json)


def show_paths(paths: Iterable[Path], as_json: bool = False) -> None:
    """Where something was written; on standard error where JSON stands on standard output."""
    for path in paths:
        typer.echo(f"-> {path}", err=as_json)


def print_table(table: Any, lines: list[str]) -> None:
    """A rich table, and sentences below it."""
    from gelora_plugins.report.table import render

    typer.echo(render(table))
    for line in lines:
        typer.echo(printable(line))
