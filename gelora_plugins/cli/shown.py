"""Tables, sentences and JSON on standard output. Heavy imports stand inside the functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def without_bars(quiet: bool) -> Iterator[None]:
    """Where it is `quiet`, without the bars of transformers and datasets: for weights, for rows."""
    if not quiet:
        yield
        return
    import datasets
    from transformers.utils import logging as messages

    of_weights, of_rows = messages.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    messages.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if of_weights:
            messages.enable_progress_bar()
        if of_rows:
            datasets.enable_progress_bars()


def print_table(table: Any, lines: list[str]) -> None:
    """A rich table, and sentences below it."""
    from gelora_plugins.report.table import render

    typer.echo(render(table))
    for line in lines:
        typer.echo(printable(line))
