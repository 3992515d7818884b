"""`gelora report`: a plan or a comparison, shown."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gelora_plugins.cli.options import AsJson
from gelora_plugins.cli.shown import show, show_paths
from gelora_plugins.errors import PlanError

EXAMPLES = (
    "gelora report plan.json",
    "gelora report out -o report  # of a training in out; then open report/report.html",
    "gelora report out/checkpoint-500 --json",
    "gelora report comparison  # of gelora compare; then open comparison/comparison.html",
)


def report(
    plan: Annotated[
        Path,
        typer.Argument(
            help="A plan, the directory of a training, a checkpoint or an adapter that has one, or the folder of a "
            "comparison."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Directory for report.html, report.md, report.json and ranks.png; of a comparison its folder, for "
            "comparison.html and the rest, if not given.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show: the verdict on a plan and its table, and with -o the files, report.html among them; or a comparison."""
    if any(plan.glob("*/experiment.json")):
        _comparison(plan, output or plan, as_json)
        return
    from gelora_plugins.ranks.plan import RankPlan
    from gelora_plugins.report.rank_report import RankReport

    loaded = RankPlan.load(_find_plan(plan))
    show(loaded, as_json)
    if output is not None:
        show_paths(RankReport(loaded).write(output), as_json)


def _find_plan(place: Path) -> Path:
    """The file of the plan at `place`: the file itself, or gelora/plan.json or plan.json of a directory.

    Raises:
        PlanError: the directory has neither.
    """
    from gelora_plugins.ranks.plan import PLAN

    if not place.is_dir():
        return place
    found = next((path for path in (place / PLAN, place / PLAN.name) if path.is_file()), None)
    if found is None:
        raise PlanError(
            f"{place} has neither {PLAN} nor {PLAN.name}. Give a plan, or the directory of a training, a "
            "checkpoint or an adapter that GeLoRA chose the ranks of."
        )
    return found


def _comparison(folder: Path, output: Path, as_json: bool) -> None:
    """Sum up what is recorded in `folder`, show it, and write its files into `output`."""
    from gelora_plugins import json_files
    from gelora_plugins.findings.summary import Comparison
    from gelora_plugins.text import printable

    found = Comparison.read(folder)
    if as_json:
        typer.echo(json_files.as_text(found.to_dict()), nl=False)
    else:
        for experiment in found.experiments:
            typer.echo(f"{printable(experiment['task']['name'])}\n\n{found.table(experiment['task']['name'])}")
        for line in found.lines():
            typer.echo(printable(line))
    show_paths(found.write(output), as_json)
