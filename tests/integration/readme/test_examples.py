"""examples/*.py of loops and other frameworks. Frameworks that are no dependency are stand-ins, which do with what an
example gives them what the framework does, as it was read there; docs/frameworks/ say with which versions each ran."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from gelora_plugins import GeLoRACallback, RankPlan
from gelora_plugins.demo import MODEL
from tests.integration.readme.test_snippets import blocks
from tests.readme.parts import PAGES, ROOT
from tests.support.letters import texts
from tests.support.plans import plan_for
from tests.support.tiny import build
from tests.support.training import peft_model, ranks_by_block, saved_plan, trainer_for

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


def run_page(page: str, **known: Any) -> dict[str, Any]:
    """What the code of docs/frameworks/PAGE.md, which is marked as `py`, makes of what it takes for granted."""
    for line, code in blocks(ROOT / "docs" / "frameworks" / f"{page}.md", "py"):
        exec(compile("\n" * line + code, f"{page}.md", "exec"), known)
    return known


@pytest.fixture
def data(workplace: Path) -> str:
    path = workplace / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf-8")
    return str(path)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a stand-in of a module into Python's table."""

    def put(name: str, **contents: Any) -> ModuleType:
        for i in range(name.count(".")):
            parent = ".".join(name.split(".")[: i + 1])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        made = ModuleType(name)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return put


def check_adapter(directory: Path) -> None:
    """The adapter there has the ranks of the plan beside it, in its configuration and in its tensors."""
    plan = RankPlan.load(directory / "gelora" / "plan.json")
    assert PeftConfig.from_pretrained(str(directory)).rank_pattern == plan.rank_pattern()
    assert ranks_by_block(PeftModel.from_pretrained(build("llama"), str(directory))) == list(plan.ranks)
    assert len({*plan.ranks, plan.base_rank}) > 1


def test_accelerate(workplace: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made = run(monkeypatch, "accelerate_loop.py", "--model", MODEL, "--data", data, "--steps", "2")
    check_adapter(workplace / "out" / "accelerate")
    assert made["model"].peft_config["default"].r == 8


def test_lightning(workplace: Path, data: str, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    class LightningModule(nn.Module):
        def log(self, name: str, value: Any, **options: Any) -> None:
            assert torch.isfinite(value)

    class Trainer:
        def __init__(self, max_steps: int, **options: Any) -> None:
            self.max_steps = max_steps

        def fit(self, model: Any, batches: Any) -> None:
            optimizer = model.configure_optimizers()
            for index, batch in zip(range(self.max_steps), batches, strict=False):
                model.training_step(batch, index).backward()
                optimizer.step()

    lightning = module("lightning", LightningModule=LightningModule, Trainer=Trainer)
    script = run(monkeypatch, "lightning_loop.py", "--model", MODEL, "--data", data, "--steps", "2")
    check_adapter(workplace / "out" / "lightning")

    names = ("LoraConfig", "select_ranks", "get_peft_model", "with_plan", "batches")
    given = {"model": AutoModelForCausalLM.from_pretrained(MODEL), "train_dataset": script["dataset"]}
    made = run_page(
        "lightning", lightning=lightning, YourModule=script["Module"], **{name: script[name] for name in names}, **given
    )
    assert ranks_by_block(PeftModel.from_pretrained(build("llama"), "adapter")) == list(made["plan"].ranks)


def test_unsloth(workplace: Path, data: str, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    class FastLanguageModel:
        @staticmethod
        def from_pretrained(name: str, max_seq_length: int) -> tuple[Any, Any]:
            return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)

        @staticmethod
        def get_peft_model(model: Any, r: int = 16, lora_alpha: float = 16, **kwargs: Any) -> Any:
            """Unsloth 2026.10.9, models/llama.py: what it has no name for goes to LoraConfig as it is."""
            return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, **kwargs))

    module("unsloth", FastLanguageModel=FastLanguageModel)
    monkeypatch.setattr("trl.SFTConfig", on_this_machine())
    plan_for(build("llama"), (2, 12, 5), LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)).save("plan.json")
    run(monkeypatch, "unsloth_sft.py", data)
    check_adapter(workplace / "out" / "unsloth")
    assert ranks_by_block(run_page("unsloth")["model"]) == [2, 12, 5]


def on_this_machine() -> Any:
    def config(*args: Any, **kwargs: Any) -> Any:
        return SFTConfig(*args, **{**kwargs, "max_steps": 2, "bf16": False, "use_cpu": True})

    return config


def test_llama_factory(workplace: Path, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    given: dict[str, Any] = {}
    module("llamafactory.train.tuner", run_exp=lambda **arguments: given.update(arguments))
    run(monkeypatch, "llama_factory.py", "config.yaml")
    check_callback(workplace, *given.pop("callbacks"))
    run_page("llama-factory")
    check_callback(workplace / "page", *given["callbacks"])


def test_ms_swift(workplace: Path, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    swift = module("swift.callbacks", callbacks_map={})
    run(monkeypatch, "ms_swift.py")
    check_callback(workplace, swift.callbacks_map.pop("gelora")("arguments", "trainer"))
    run_page("ms-swift")
    check_callback(workplace / "page", swift.callbacks_map["gelora"]("arguments", "trainer"))


def check_callback(directory: Path, callback: GeLoRACallback) -> None:
    """Both frameworks give the callback to a Trainer when they make it."""
    trainer = trainer_for(peft_model(), directory, callback)
    trainer.train()
    plan = saved_plan(directory)
    assert plan.policy == "budget"
    assert ranks_by_block(trainer.model) == list(plan.ranks)


def test_every_page_of_a_framework_that_is_not_installed_is_run_above() -> None:
    """What is marked as `python` runs in test_snippets.py."""
    assert {page.stem for page in PAGES if blocks(page, "py")} == {"lightning", "unsloth", "llama-factory", "ms-swift"}
