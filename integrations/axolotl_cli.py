"""`axolotl gelora CONFIG.yml`: the ranks that a training would get, without training.

Apart from the plugin, because `axolotl --help` imports the module of every subcommand: nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from gelora_plugins.errors import ApplyError, ConfigError
from gelora_plugins.mistakes import sentence
from gelora_plugins.text import printable

if TYPE_CHECKING:
    from peft import LoraConfig

    from gelora_plugins.ranks.plan import RankPlan

PLUGIN = "gelora_plugins.GeLoRAPlugin"
# Axolotl 0.21 overrides the same keys to load a model in one piece when it merges (cli/merge_lora.py).
UNSHARDED = {"deepspeed": None, "fsdp": None, "fsdp_config": None}


class Refusal(click.ClickException):
    """One sentence on stderr, and the exit code of `gelora` for a user's error."""

    exit_code = 2


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Save the plan, for `gelora: {plan: FILE}`.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="The report as JSON on stdout, after Axolotl's banner.",
)
def gelora(config: str, output: str | None, as_json: bool) -> None:
    """Choose LoRA ranks for a config; do not train.

    Loads the model and the data of CONFIG, measures, and prints the plan, also as YAML for a config without the
    plugin. CONFIG may list gelora in `plugins` or not. Nothing is written to its output directory.
    """
    from gelora_plugins import json_files
    from gelora_plugins.report.rank_report import RankReport, show

    try:
        with _stdout_to_stderr() if as_json else contextlib.nullcontext():
            plan, written = choose(config)
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        raise Refusal(printable(said)) from error
    if as_json:
        click.echo(json_files.as_text(RankReport(plan).to_dict()), nl=False)
    else:
        show(RankReport(plan))
    if output is not None:
        plan.save(output)
        click.echo(f"To train with these ranks and measure nothing:\n\ngelora:\n  plan: {output}\n", err=as_json)
    click.echo(patterns_yaml(plan, written), err=as_json)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """For what others print, by turning the descriptor: Axolotl's log handlers hold standard output already (0.21)."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def choose(config: str) -> tuple[RankPlan, LoraConfig]:
    """The plan that training with the configuration would choose, and what that says of ranks already.

    Raises:
        GeLoRAError: no ranks can be chosen.
    """
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets, load_preference_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import setup_model_and_trainer
    from gelora_plugins.integrations.axolotl import GeLoRAPlugin, is_named, lora_config

    with open(config, encoding="utf-8") as file:
        written = yaml.safe_load(file) or {}
    if not isinstance(written, dict):
        raise ConfigError(f"{config} holds a {type(written).__name__}; expected a configuration of Axolotl.")
    plugins = list(written.get("plugins") or [])
    if not is_named(written):
        plugins.append(PLUGIN)
    with tempfile.TemporaryDirectory() as output_dir:  # load_cfg writes a log there, and Axolotl more
        cfg = load_cfg(config, plugins=plugins, output_dir=output_dir, **UNSHARDED)
        if cfg.lora_model_dir:
            raise ApplyError(
                "lora_model_dir is set: an adapter that exists keeps its ranks. Remove it to choose ranks."
            )
        manager = PluginManager.get_instance()
        dataset = manager.load_datasets(cfg, preprocess=False)
        if dataset is None:
            dataset = (load_preference_datasets if cfg.rl else load_datasets)(cfg=cfg)
        setup_model_and_trainer(cfg, dataset)
        plugin = next(p for p in manager.plugins.values() if isinstance(p, GeLoRAPlugin))
        plan = plugin.plan or plugin.selection.choose()
    return plan, lora_config(cfg)


def patterns_yaml(plan: RankPlan, config: LoraConfig) -> str:
    """`lora_rank_pattern` and `lora_alpha_pattern` for an Axolotl configuration; the user's own stay in force.

    Axolotl 0.19 and 0.21 take whole numbers only in both.
    """
    import yaml

    from gelora_plugins.ranks.plan_check import with_plan

    planned = with_plan(config, plan)
    if not all(isinstance(alpha, int) for alpha in planned.alpha_pattern.values()):
        return (
            "These ranks cannot be written as lora_alpha_pattern: Axolotl takes whole numbers there, and the scaling "
            f"{plan.scaling:g} needs others. Save the plan with -o plan.json and set `gelora: {{plan: plan.json}}`, or "
            "make lora_alpha a multiple of lora_r."
        )
    keys = {
        "lora_r": planned.r,
        "lora_alpha": planned.lora_alpha,
        "lora_rank_pattern": planned.rank_pattern,
        "lora_alpha_pattern": planned.alpha_pattern,
    }
    return "The same ranks without the plugin:\n\n" + yaml.safe_dump(keys, sort_keys=False, width=1000)
