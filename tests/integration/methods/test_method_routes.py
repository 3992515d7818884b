"""One line each: a training method by callback, by the option `method`, in TRL's command and in a resumed training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.errors import ConfigError, MethodError
from gelora_plugins.methods.base import SIDECAR, TrainingMethod
from gelora_plugins.methods.by_name import make_method
from gelora_plugins.methods.flat_lora import FlatLoRA
from tests.support.training import arguments, losses, peft_model, rows


class Other(TrainingMethod):
    """A second method that changes how the adapter is trained."""

    name = "other"


class Another(Other):
    name = "another"


def trainer(directory: Path, *callbacks: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(
        model=peft_model(), args=arguments(directory, **options), train_dataset=rows(), callbacks=list(callbacks)
    )


def trained(directory: Path, *callbacks: Any, **options: Any) -> list[float]:
    made = trainer(directory, *callbacks, **options)
    made.train()
    return losses(made)


def test_a_method_works_without_geloracallback_beside_it_and_by_the_option(tmp_path: Path) -> None:
    uniform = GeLoRAConfig(policy="uniform")
    alone = trained(tmp_path / "a", FlatLoRA(0.3))
    beside = trained(tmp_path / "b", GeLoRACallback(uniform), FlatLoRA(0.3))
    before = trained(tmp_path / "c", FlatLoRA(0.3), GeLoRACallback(uniform))
    named = trained(tmp_path / "d", GeLoRACallback(GeLoRAConfig(policy="uniform", method="flat_lora sigma=0.3")))
    assert alone == beside == before == named
    assert alone != trained(tmp_path / "e")


def test_two_methods_that_change_the_training_refuse_each_other(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"^another and other both change how the adapter is trained"):
        trainer(tmp_path, Other(), Another())
    trainer(tmp_path, Other(), FlatLoRA())


def test_a_method_that_comes_too_late_says_so(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.add_callback(FlatLoRA())
    with pytest.raises(MethodError, match=r"^flat_lora was added to a Trainer that exists already. .*FlatLoRA\(\)"):
        made.train()


def test_a_checkpoint_is_resumed_with_the_method_that_made_it(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", FlatLoRA(0.3), max_steps=4)
    trained(tmp_path / "cut", FlatLoRA(0.3), max_steps=4, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    resumed = trainer(tmp_path / "cut", FlatLoRA(0.3), max_steps=4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == whole
    with pytest.raises(
        MethodError, match=r'is of flat_lora with .*"sigma": 0.3.*expected flat_lora with .*"sigma": 0.1'
    ):
        trainer(tmp_path / "cut", FlatLoRA(0.1), max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / SIDECAR).write_bytes(b"cut off")
    with pytest.raises(MethodError, match="cannot be read"):
        trainer(tmp_path / "cut", FlatLoRA(0.3), max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / SIDECAR).unlink()
    with pytest.raises(MethodError, match=r"checkpoint-2 has no gelora/method.safetensors: it is of a training with"):
        trainer(tmp_path / "cut", FlatLoRA(0.3), max_steps=4).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "flat_lora knows plain LoRA, and the adapter has use_dora"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "flat_lora knows LoRA on linear maps; .*embed_tokens"),
    ],
)
def test_adapters_of_another_kind_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    made = Trainer(model=peft_model(**options), args=arguments(tmp_path), train_dataset=rows(), callbacks=[FlatLoRA()])
    with pytest.raises(MethodError, match=message):
        made.train()


def test_a_frozen_matrix_and_fp16_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, FlatLoRA())
    next(p for name, p in made.model.named_parameters() if "lora_A" in name).requires_grad_(False)
    with pytest.raises(MethodError, match=r"flat_lora trains lora_A and lora_B; one of .* is frozen"):
        made.train()
    made = trainer(tmp_path, FlatLoRA())
    made.args.fp16 = True
    with pytest.raises(MethodError, match="flat_lora was not tried with fp16"):
        made.train()


def test_a_training_that_may_begin_anew_in_the_middle_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, FlatLoRA(), auto_find_batch_size=True)
    with pytest.raises(MethodError, match=r"^auto_find_batch_size begins anew after a step that flat_lora"):
        made.train()


def test_a_method_by_its_name_and_options() -> None:
    assert make_method("flat_lora sigma=0.1 mode=swap").options() == {"sigma": 0.1, "mode": "swap"}
    config = GeLoRAConfig.from_dict({"method": {"name": "flat_lora", "sigma": 0.1, "mode": "swap"}})
    assert config.method == "flat_lora sigma=0.1 mode=swap"
    for text, message in {
        "flat": "method 'flat' does not exist; there are: .*flat_lora",
        "flat_lora sigm=1": "method flat_lora was given 'sigm=1'. Did you mean sigma",
        "flat_lora sigma": "method flat_lora was given 'sigma'. Expected option=value with: sigma, mode",
        "flat_lora sigma=much": "method flat_lora cannot be made with {'sigma': 'much'}",
        "flat_lora sigma=-1": "sigma is -1; expected 0 or more",
        "": "method '' does not exist",
    }.items():
        with pytest.raises(ConfigError, match=message):
            make_method(text)
    with pytest.raises(ConfigError, match=r"gelora\.method is .* expected a mapping"):
        GeLoRAConfig.from_dict({"method": {"sigma": 0.1}})
