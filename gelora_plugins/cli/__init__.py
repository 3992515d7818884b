"""The command `gelora`, one file a command. Heavy imports stand inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gelora_plugins.cli import compare, demo, export, plan, probe, report, sft
from gelora_plugins.mistakes import sentence
from gelora_plugins.text import printable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Choose LoRA ranks from the geometry of your data in your model.\n\n"
    "[bold]gelora demo[/] shows all of it on a small real model. For your own: [bold]gelora probe[/] measures, "
    "[bold]gelora plan[/] chooses ranks from what was measured, [bold]gelora report[/] shows them. Most people need "
    "none of these: add GeLoRACallback() to your Trainer and train.",
)
EXAMPLES = {
    "demo": demo.EXAMPLES,
    "probe": probe.EXAMPLES,
    "plan": plan.EXAMPLES,
    "report": report.EXAMPLES,
    "export": export.EXAMPLES,
    "compare": compare.EXAMPLES,
}
for command in (demo.demo, probe.probe, plan.plan, report.report, export.export, compare.compare):
    # The lines of a paragraph are joined in a terminal (typer 0.29).
    app.command(epilog="\n\n".join(["Examples:", *EXAMPLES[command.__name__]]))(command)
# What follows `gelora sft` is TRL's to read, `--help` too.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    sft.sft
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"gelora {version('gelora')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command; a user's error is one sentence on stderr and exit code 2."""
    try:
        app()
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        typer.echo(f"gelora: {printable(said)}", err=True)
        sys.exit(2)
