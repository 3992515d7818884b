"""What each training method refuses, in one sentence, before the first step, with the model as it was."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gelora_plugins.errors import GeLoRAError, MethodError
from gelora_plugins.methods.adalora import AdaLoRA
from gelora_plugins.methods.base import SIDECAR, TrainingMethod
from gelora_plugins.methods.beamlora import BeamLoRA
from gelora_plugins.methods.sora import SoRA
from tests.support.methods import METHODS, STEPS, adapted, method_trainer
from tests.support.training import layers, state_of

# What the base refuses is refused by it alone: one with state and one without show that it is asked.
EACH = pytest.mark.parametrize("name", ["beamlora", "sora-budget"])
GATED = pytest.mark.parametrize("name", ["adalora", "beamlora", "diffora", "sora", "sora-budget"])
SAVING = {"save_strategy": "steps", "save_steps": 4}


def refused(trainer: Any, **how: Any) -> str:
    """What is said; nothing may have changed."""
    before = state_of(trainer.model)
    clip = trainer.args.max_grad_norm
    with pytest.raises(GeLoRAError) as error:
        trainer.train(**how)
    assert isinstance(error.value, MethodError) or "optimizer" in str(error.value)
    if not how:  # a checkpoint was loaded otherwise
        assert state_of(trainer.model) == before
    assert trainer.args.max_grad_norm == clip
    return str(error.value)


@EACH
def test_dora_and_biases(tmp_path: Path, name: str) -> None:
    for option in ("use_dora", "lora_bias"):
        targets = {"target_modules": ["q_proj"], "rank_pattern": {}}
        said = refused(method_trainer(adapted(**{option: True}, **targets), tmp_path, METHODS[name]()))
        assert said.endswith(f" knows plain LoRA, and the adapter has {option}. Make it without.")


@EACH
def test_embeddings(tmp_path: Path, name: str) -> None:
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    assert " knows LoRA on linear maps; model.embed_tokens is " in refused(
        method_trainer(model, tmp_path, METHODS[name]())
    )


@EACH
@pytest.mark.parametrize("how", ["is_fsdp_enabled", "is_deepspeed_enabled", "is_distributed_loading_by_transformers"])
def test_what_shards_the_matrices(tmp_path: Path, name: str, how: str) -> None:
    """A stub: such a Trainer cannot be made in one process. The method sees what it would see."""
    method = METHODS[name]()
    trainer = method_trainer(adapted(), tmp_path, method)
    trainer.create_optimizer_and_scheduler(STEPS)
    stub = SimpleNamespace(
        **{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, how: True}, args=trainer.args, model=trainer.model
    )
    method.optimizer = trainer.optimizer
    with pytest.raises(MethodError, match=" needs whole matrices and their gradients in each process, which FSDP and "):
        method._check_trainer(stub)


@EACH
def test_a_frozen_matrix(tmp_path: Path, name: str) -> None:
    model = adapted()
    next(iter(layers(model).values())).lora_A["default"].weight.requires_grad_(False)
    said = refused(method_trainer(model, tmp_path, METHODS[name]()))
    assert said.endswith(" trains lora_A and lora_B; one of model.layers.0.self_attn.q_proj is frozen.")


@EACH
def test_fp16(tmp_path: Path, name: str) -> None:
    """accelerate has it on accelerators only, so the flag is set once the Trainer is made."""
    trainer = method_trainer(adapted(), tmp_path, METHODS[name]())
    trainer.args.fp16 = True
    assert " was not tried with fp16, whose scaled gradients it would see. Use bf16." in refused(trainer)


@EACH
def test_an_optimizer_that_exchanges_the_parameters(tmp_path: Path, name: str) -> None:
    class AdamWScheduleFree(torch.optim.SGD):
        """Stands for schedulefree's, which is told by its name."""

    model = adapted()
    optimizer = AdamWScheduleFree([p for p in model.parameters() if p.requires_grad], lr=0.1)
    said = refused(method_trainer(model, tmp_path, METHODS[name](), optimizers=(optimizer, None)))
    assert " does not go with AdamWScheduleFree, which steps out of its sight or exchanges the parameters." in said


@EACH
def test_an_optimizer_that_does_not_hold_the_adapter(tmp_path: Path, name: str) -> None:
    model = adapted()
    matrices = [p for n, p in model.named_parameters() if "lora_B" in n]
    optimizer = torch.optim.SGD(matrices, lr=0.1)
    said = refused(method_trainer(model, tmp_path, METHODS[name](), optimizers=(optimizer, None)))
    assert said.startswith("The optimizer does not hold 9 of the 18 trainable parameters of the adapter 'default', ")


@pytest.mark.parametrize("name", ["adalora", "diffora", "sora", "sora-budget"])
def test_a_trained_adapter(tmp_path: Path, name: str) -> None:
    trainer = method_trainer(adapted(), tmp_path, METHODS[name]())
    trainer.train()
    again = method_trainer(trainer.model, tmp_path, METHODS[name]())
    assert "begins with a fresh adapter, and lora_B of model.layers.0.self_attn.q_proj is not 0" in refused(again)
    with pytest.raises(MethodError, match="begins with a fresh adapter"):
        trainer.train()


def test_an_initialisation_that_adalora_would_throw_away(tmp_path: Path) -> None:
    said = refused(method_trainer(adapted(init_lora_weights="eva"), tmp_path, AdaLoRA()))
    assert said == "adalora draws A and B itself, and would throw away what init_lora_weights='eva' made. Use True."


@EACH
def test_a_checkpoint_without_the_sidecar(tmp_path: Path, name: str) -> None:
    method_trainer(adapted(), tmp_path, METHODS[name](), **SAVING).train()
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / SIDECAR).unlink()
    said = refused(
        method_trainer(adapted(), tmp_path, METHODS[name](), **SAVING), resume_from_checkpoint=str(checkpoint)
    )
    assert said.startswith(f"{checkpoint} has no gelora/method.safetensors: it is of a training without ")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (AdaLoRA(keep=0.5), AdaLoRA(keep=0.6)),
        (SoRA(), SoRA(threshold="official")),
        (BeamLoRA(), BeamLoRA(scope="module")),
        (BeamLoRA(), SoRA()),
    ],
)
def test_a_checkpoint_of_other_options(tmp_path: Path, before: TrainingMethod, after: TrainingMethod) -> None:
    method_trainer(adapted(), tmp_path, before, **SAVING).train()
    trainer = method_trainer(adapted(), tmp_path, after, **SAVING)
    said = refused(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert said.startswith(f"The checkpoint {tmp_path / 'checkpoint-4'} is of {before.name} with ")
    assert said.endswith(". Resume with the same, or start anew.")


@GATED
def test_a_checkpoint_of_a_training_of_another_length(tmp_path: Path, name: str) -> None:
    method_trainer(adapted(), tmp_path, METHODS[name](), **SAVING).train()
    trainer = method_trainer(adapted(), tmp_path / "again", METHODS[name](), max_steps=12, **SAVING)
    said = refused(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert said.startswith("The checkpoint is of a training of 8 steps, and this one has 12: the schedule of ")


@EACH
def test_a_damaged_sidecar(tmp_path: Path, name: str) -> None:
    method_trainer(adapted(), tmp_path, METHODS[name](), **SAVING).train()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "cut")
    sidecar = tmp_path / "cut" / SIDECAR
    sidecar.write_bytes(sidecar.read_bytes()[:20])
    said = refused(
        method_trainer(adapted(), tmp_path, METHODS[name](), **SAVING), resume_from_checkpoint=str(tmp_path / "cut")
    )
    assert said.startswith(f"{sidecar} cannot be read: ")


@pytest.mark.parametrize("first", ["adalora", "beamlora"])
def test_two_methods_that_change_the_adapter(tmp_path: Path, first: str) -> None:
    with pytest.raises(MethodError, match=" both change how the adapter is trained"):
        method_trainer(adapted(), tmp_path, METHODS[first](), SoRA())
