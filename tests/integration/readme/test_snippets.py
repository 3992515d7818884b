"""Every example of the README and docs/: Python runs on a tiny model, commands and YAML are what is accepted."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from datasets import Dataset
from gelora_plugins.integrations.axolotl_cli import gelora as axolotl_gelora
from gelora_plugins.integrations.trl import EXAMPLE
from peft import PeftConfig
from torch.distributed.run import parse_args as torchrun_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig, TrlParser
from trl.scripts import sft

import gelora_plugins
from gelora_plugins import GeLoRAConfig, RankPlan
from gelora_plugins.cli import app
from gelora_plugins.demo import MODEL
from tests.readme.parts import PAGES, ROOT
from tests.support.letters import texts
from tests.support.training import ranks_by_block, rows

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line before the first, code) of every block of that language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def with_blocks(language: str) -> Any:
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def given() -> dict[str, Any]:
    """What an example takes for granted: a model that was loaded, data, the arguments of a trainer."""
    short: dict[str, Any] = {"max_steps": 4, "report_to": [], "use_cpu": True}
    short |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    return {
        "model": AutoModelForCausalLM.from_pretrained(MODEL),
        "tokenizer": AutoTokenizer.from_pretrained(MODEL),
        "train_dataset": rows(),
        "dataset": Dataset.from_list([{"text": text} for text in texts()]),
        "preferences": Dataset.from_list([{"prompt": t, "chosen": t[::-1], "rejected": "no"} for t in texts()]),
        "args": TrainingArguments("out", **short),
        "sft_args": SFTConfig("out-sft", bf16=False, **short),
    }


@with_blocks("python")
def test_python_runs(page: Path, workplace: Path) -> None:
    """Names go from block to block of a page, but for what is given, which is new in each."""
    names: dict[str, Any] = {"__name__": "example"}
    for line, code in blocks(page, "python"):
        torch.manual_seed(0)
        names |= given()
        exec(compile("\n" * line + code, str(page), "exec"), names)
    if page.name == "README.md":
        check_readme(names)


def check_readme(names: dict[str, Any]) -> None:
    """The adapter of the quickstart, the first block, has its plan beside it; the own loop's, the last, has its own."""
    assert PeftConfig.from_pretrained("adapter").rank_pattern.keys() == names["plan"].rank_pattern().keys()
    assert RankPlan.load("out/gelora/plan.json").policy == "budget"  # of the second block
    assert ranks_by_block(names["model"]) == list(names["plan"].ranks)
    assert names["model"].peft_config["default"].r == 16


@with_blocks("bash")
def test_commands_take_these_arguments(page: Path, workplace: Path) -> None:
    (workplace / "config.yml").touch()
    for _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            check_command(shlex.split(line, comments=True))


def test_the_example_of_its_help_is_what_sft_takes(workplace: Path) -> None:
    check_command(shlex.split(EXAMPLE.removeprefix("Example: ")))


def check_command(words: list[str]) -> None:
    match words:
        case ["pip", "install", place]:
            extras = place.removeprefix(".").strip("[]").split(",")
            assert set(filter(None, extras)) <= PYPROJECT["project"]["optional-dependencies"].keys()
        case ["torchrun", *rest]:
            launched = torchrun_arguments(rest)
            assert launched.training_script == "$(which gelora)"
            check_command(["gelora", *launched.training_script_args])
        case ["axolotl", "gelora", *rest]:
            axolotl_gelora.make_context("gelora", rest)
        case ["gelora", "sft", *rest]:
            on_this_machine = [*rest, "--use_cpu", "--bf16", "False"]
            TrlParser([*sft.make_parser().dataclass_types, GeLoRAConfig]).parse_args_into_dataclasses(on_this_machine)
        case ["gelora", name, *rest]:
            typer.main.get_command(app).commands[name].make_context(name, rest)
        case _:
            raise AssertionError(f"no check for: {' '.join(words)}")


@with_blocks("yaml")
def test_yaml_is_what_axolotl_takes(page: Path) -> None:
    """Keys are those of the example that the Axolotl environments train; the section is ours."""
    known = yaml.safe_load((ROOT / "examples" / "axolotl.yml").read_text(encoding="utf-8")).keys()
    for _, code in blocks(page, "yaml"):
        config = yaml.safe_load(code)
        assert config.keys() <= known
        assert all(name.removeprefix("gelora_plugins.") in gelora_plugins.__all__ for name in config["plugins"])
        GeLoRAConfig.from_dict(config["gelora"])


@with_blocks("toml")
def test_toml_is_an_entry_point(page: Path) -> None:
    for _, code in blocks(page, "toml"):
        (module,) = tomllib.loads(code)["project"]["entry-points"]["gelora"].values()
        assert f'"""{module}.py"""' in page.read_text(encoding="utf-8")
