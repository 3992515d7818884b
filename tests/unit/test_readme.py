"""What the README shows is run here, and what it lists is what there is."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

import gelora_plugins
from tests.readme_parts import PARTS
from tests.tiny import build
from tests.training import ranks_by_block, rows

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_parts_made_from_code_and_recorded_results_are_as_they_are_made(part: Callable[[], str]) -> None:
    made = f"<!-- {part.__name__} -->\n{part()}\n<!-- /{part.__name__} -->"
    assert README.count(made) == 1, "run python -m tests.readme_parts"


@pytest.mark.parametrize("number", range(2))
def test_python_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[number]
    args = TrainingArguments("out", max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True)
    names = {"model": build("llama"), "args": args, "train_dataset": rows()}
    exec(compile(code, "README.md", "exec"), names)
    trained = names["model"]
    assert ranks_by_block(trained) == list(names["plan"].ranks if "plan" in names else saved_ranks(tmp_path))


def saved_ranks(directory: Path) -> list[int]:
    return list(gelora_plugins.RankPlan.load(directory / "out" / "gelora" / "plan.json").ranks)


def test_every_public_name_can_be_imported() -> None:
    for name in gelora_plugins.__all__:
        if name != "GeLoRAPlugin":  # needs axolotl; its own environments import it
            assert getattr(gelora_plugins, name) is not None


def test_every_file_that_the_readme_links_to_is_there() -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert links
    assert [target for target in links if not (ROOT / target).exists()] == []


def test_a_lora_config_takes_the_plans_arguments() -> None:
    plan = gelora_plugins.select_ranks(build("gpt2"), rows(), progress=False)
    model = get_peft_model(build("gpt2"), LoraConfig(target_modules="all-linear", **plan.lora_config_kwargs()))
    assert model.peft_config["default"].r == 8
