"""What methods that change the steps cannot train: refused before the first step, in words that name the way out."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, get_cosine_schedule_with_warmup

from gelora_plugins.errors import GeLoRAError, MethodError, TooLateError
from gelora_plugins.methods.base import SIDECAR
from gelora_plugins.methods.by_name import make_method
from gelora_plugins.methods.cola import COLA
from gelora_plugins.methods.lora_pro import LoRAPro
from gelora_plugins.methods.rm_lora import RMLoRA
from gelora_plugins.methods.xgblora import XGBLoRA
from tests.support.steps import METHODS, adapted, train
from tests.support.training import peft_model, state_of

each_method = pytest.mark.parametrize("name", METHODS)
SAVING = {"save_strategy": "steps", "save_steps": 3}


def refused(model: nn.Module, directory: Path, *callbacks: TrainerCallback, **options: Any) -> str:
    """What a training that is refused says. It leaves all as it was, but for the checkpoint, which was loaded."""
    generators = torch.get_rng_state()
    before = state_of(model)
    with pytest.raises(GeLoRAError) as caught:
        train(model, directory, *callbacks, **options)
    torch.set_rng_state(generators)  # a Trainer seeds them
    same = slice(1, 4) if "resume" in options else slice(4)
    assert state_of(model)[same] == before[same]
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@each_method
@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_other_kinds_of_lora(tmp_path: Path, name: str, option: str) -> None:
    said = refused(adapted(**{option: True}), tmp_path, METHODS[name]())
    assert f"knows plain LoRA, and the adapter has {option}. Make it without." in said


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "orthogonal", False])
@pytest.mark.parametrize("name", ["cola", "xgblora"])
def test_initialisations_that_a_slot_would_not_have(tmp_path: Path, name: str, init: Any) -> None:
    said = refused(peft_model(init_lora_weights=init), tmp_path, METHODS[name]())
    assert f"draws matrices as init_lora_weights of True does; the adapter has {init!r}." in said


@pytest.mark.parametrize("name", ["cola", "xgblora"])
def test_dropout_and_trained_adapters_have_no_slots(tmp_path: Path, name: str) -> None:
    said = refused(adapted(lora_dropout=0.1), tmp_path, METHODS[name]())
    assert re.search(r"would be dropped by lora_dropout=0.1, as nothing merged would be. Use lora_dropout=0.", said)
    model = adapted()
    train(model, tmp_path)
    assert "begins with a fresh adapter, and lora_B of" in refused(model, tmp_path, METHODS[name]())


def test_schedules_that_do_not_fit(tmp_path: Path) -> None:
    assert "cola ties 3 knots; the training has 2 steps" in refused(adapted(), tmp_path, COLA(), max_steps=2)
    assert "6 boosters for the 12 ranks" in refused(adapted(), tmp_path, XGBLoRA(blocks=2), max_steps=5)
    said = refused(adapted(), tmp_path, XGBLoRA(blocks=3))
    assert "No boosters of 3 blocks give the 3 blocks their ranks, which are 5, 3, 4" in said
    said = refused(adapted(target_modules=["q_proj", "lm_head"]), tmp_path, XGBLoRA(blocks=1))
    assert "xgblora boosts transformer blocks, and lm_head is in none." in said


@pytest.mark.parametrize("kind", ["of the user's", "by the loss"])
def test_a_schedule_that_is_not_the_arguments_cannot_restart(tmp_path: Path, kind: str) -> None:
    def options(model: nn.Module) -> dict[str, Any]:
        if kind == "by the loss":
            return {"lr_scheduler_type": "reduce_lr_on_plateau", **evaluating}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05)
        return {"optimizers": (optimizer, get_cosine_schedule_with_warmup(optimizer, 1, 6))}

    evaluating = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}
    evaluating["eval_dataset"] = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    model = adapted()
    said = refused(model, tmp_path, COLA(), **options(model))
    assert "Set it in the arguments, or use restart=False." in said
    train(model, tmp_path, COLA(restart=False), **options(model))


@each_method
def test_a_checkpoint_without_its_sidecar_or_of_another_training(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    train(adapted(), tmp_path, METHODS[name](), **SAVING)
    other = RMLoRA(share=0.3) if not name.startswith("rm_lora") else COLA()
    assert "Resume with the same, or start anew." in refused(adapted(), tmp_path, other, resume=checkpoint)
    shutil.rmtree(checkpoint / SIDECAR.parent)
    said = refused(adapted(), tmp_path, METHODS[name](), resume=checkpoint)
    assert f"checkpoint-3 has no {SIDECAR}" in said


def test_other_options_on_resuming(tmp_path: Path) -> None:
    train(adapted(), tmp_path, COLA(), **SAVING)
    said = refused(adapted(), tmp_path, COLA(knots=2), resume=tmp_path / "checkpoint-3")
    assert '"knots": 3' in said
    assert '"knots": 2' in said
    assert "Resume with the same, or start anew." in said


@pytest.mark.parametrize("changed", [{"max_steps": 12}, {"seed": 1}])
def test_another_schedule_on_resuming(tmp_path: Path, changed: dict[str, int]) -> None:
    train(adapted(), tmp_path, METHODS["xgblora"](), **SAVING)
    resumed = {"resume": tmp_path / "checkpoint-3", **changed}
    said = refused(adapted(), tmp_path, METHODS["xgblora"](), **resumed)
    assert "xgblora had another schedule when the checkpoint was written: max_steps, seed or ranks " in said


def test_a_sidecar_that_lacks_the_schedule(tmp_path: Path) -> None:
    train(adapted(), tmp_path, COLA(), **SAVING)
    path = tmp_path / "checkpoint-3" / SIDECAR
    starts = load_file(path)["starts"]
    described = {"method": "cola", "options": '{"knots": 3, "restart": true}'}
    save_file({"starts": starts}, path, metadata=described)
    assert "another schedule" in refused(adapted(), tmp_path, COLA(), resume=tmp_path / "checkpoint-3")


def test_lora_pro_without_its_moments(tmp_path: Path) -> None:
    train(adapted(), tmp_path, LoRAPro(), **SAVING)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    said = refused(adapted(), tmp_path, LoRAPro(), resume=tmp_path / "checkpoint-3")
    assert "has no moments of lora_pro for model.layers.0.self_attn.q_proj: its optimizer.pt is missing" in said
    said = refused(adapted(torch.bfloat16), tmp_path, LoRAPro())
    assert "is torch.bfloat16. Make the adapter in float32, as PEFT does by itself, or use mode=efficient." in said


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", "SGD"), ("adafactor", "Adafactor")])
def test_lora_pro_without_the_settings_of_adamw(tmp_path: Path, optimizer: str, kind: str) -> None:
    said = refused(adapted(), tmp_path, LoRAPro(), optim=optimizer)
    assert f"takes AdamW's betas and eps from the optimizer, and {kind} has not both. Use optim='adamw_torch'" in said
    train(adapted(), tmp_path, LoRAPro(mode="efficient"), optim=optimizer)


@each_method
def test_two_methods(tmp_path: Path, name: str) -> None:
    # Flat-LoRA goes with the others, and not with itself: test_step_methods.py.
    second = METHODS[name]() if name.startswith("flat") else RMLoRA()
    said = refused(adapted(), tmp_path, METHODS[name](), second)
    assert "both change how the adapter is trained. Give the Trainer one of them." in said


@each_method
def test_precision_optimizers_and_moments_that_do_not_fit(tmp_path: Path, name: str) -> None:
    model = adapted()
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    own.__class__ = type("AdamWScheduleFree", (torch.optim.SGD,), {})
    said = refused(model, tmp_path, METHODS[name](), optimizers=(own, None))
    assert "does not go with AdamWScheduleFree" in said
    half = torch.optim.SGD([p for n, p in model.named_parameters() if "lora_A" in n], 0.1)
    with pytest.raises(TooLateError, match="does not hold 21 of the 42"):
        train(model, tmp_path, METHODS[name](), optimizers=(half, None))


def test_maps_that_are_not_linear(tmp_path: Path) -> None:
    said = refused(adapted(target_modules=["embed_tokens", "q_proj"]), tmp_path, RMLoRA())
    assert "knows LoRA on linear maps; model.embed_tokens is" in said


@pytest.mark.parametrize("name", METHODS)
def test_each_is_made_by_its_name(name: str) -> None:
    expected = METHODS[name]()
    options = " ".join(f"{key}={str(value).lower()}" for key, value in expected.options().items() if value is not None)
    made = make_method(f"{expected.name} {options}")
    assert type(made) is type(expected)
    assert made.options() == expected.options()


def test_a_frozen_matrix(tmp_path: Path) -> None:
    model = peft_model()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    with pytest.raises(MethodError, match=r"one of .* is frozen"):
        train(model, tmp_path, RMLoRA())
