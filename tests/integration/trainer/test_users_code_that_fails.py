"""The user's model or data raise where GeLoRA calls them: one of our errors, with its cause; `keep` keeps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, ViTConfig, ViTForImageClassification

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.errors import GeLoRAError, LayoutError, ProbeError
from gelora_plugins.plugins import find_layout
from tests.support.tiny import build
from tests.support.training import LORA, arguments, peft_model, ranks_by_block, rows, state_of, trainer_for


class Rows(torch.utils.data.Dataset):
    """Raises at the first row that GeLoRA reads, and never again."""

    def __init__(self) -> None:
        self.broken = True

    def __len__(self) -> int:
        return 120

    def __getitem__(self, i: int) -> Any:
        if self.broken:
            self.broken = False
            raise FileNotFoundError("row.wav is gone")
        return rows()[i]


def in_evaluation_mode() -> dict[str, Any]:
    """A forward pass that works in training only."""
    model = peft_model()

    def refuse(module: nn.Module, args: Any) -> None:
        if not module.training:
            raise NotImplementedError("only in training")

    model.get_base_model().model.layers[1].register_forward_pre_hook(refuse)
    return {"model": model}


CASES: dict[str, tuple[type[GeLoRAError], str, type[Exception], Callable[[], dict[str, Any]]]] = {
    "the model": (ProbeError, "The forward pass of LlamaModel", NotImplementedError, in_evaluation_mode),
    "the rows": (
        ProbeError,
        "Reading the training data failed: FileNotFoundError: row.wav is gone",
        FileNotFoundError,
        lambda: {"model": peft_model(), "train_dataset": Rows()},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_of_our_errors_with_its_cause_and_nothing_has_changed(tmp_path: Path, case: str) -> None:
    error, words, cause, make = CASES[case]
    options = make()
    trainer = trainer_for(options.pop("model"), tmp_path, GeLoRACallback(), **options)
    before = state_of(trainer.model)
    with pytest.raises(error) as caught:
        trainer.train()
    assert words in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)
    assert state_of(trainer.model) == before


@pytest.mark.parametrize("case", CASES)
def test_keep_trains_with_the_users_ranks(tmp_path: Path, case: str) -> None:
    options = CASES[case][3]()
    callback = GeLoRACallback(GeLoRAConfig(on_failure="keep"))
    trainer = trainer_for(options.pop("model"), tmp_path, callback, **options)
    trainer.train()
    assert ranks_by_block(trainer.model) == [4, 4, 4]
    assert trainer.state.global_step == 3


class LargerImages(Trainer):
    """Gives the model what no batch holds."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs, interpolate_pos_encoding=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.mark.parametrize("on_failure", ["raise", "keep"])
def test_a_compute_loss_that_gives_the_model_what_the_batch_lacks(tmp_path: Path, on_failure: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    generator = torch.Generator().manual_seed(0)
    dataset = [{"pixel_values": torch.randn(3, 12, 12, generator=generator), "labels": i % 2} for i in range(60)]
    trainer = LargerImages(
        model=get_peft_model(base, LoraConfig(**LORA)),
        args=arguments(tmp_path, remove_unused_columns=False, label_names=["labels"]),
        train_dataset=dataset,
        callbacks=[GeLoRACallback(GeLoRAConfig(on_failure=on_failure))],
    )
    if on_failure == "keep":
        trainer.train()
        assert trainer.state.global_step == 3
    else:
        with pytest.raises(ProbeError, match=r"pixel_values \(16, 3, 12, 12\).*compute_loss of your own"):
            trainer.train()


def test_the_probe_runs_under_the_mixed_precision_of_the_training(tmp_path: Path) -> None:
    """A bfloat16 model whose norms are float32 runs under autocast alone."""
    model = peft_model()
    for parameter in model.get_base_model().parameters():
        if parameter.requires_grad or parameter.ndim == 1:
            parameter.data = parameter.data.float()
        else:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ProbeError, match="dtype"):
        trainer_for(model, tmp_path, GeLoRACallback()).train()
    seen: list[torch.dtype] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output.dtype)

    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(look)
    trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")), bf16=True).train()
    assert set(seen) == {torch.bfloat16}


def test_a_search_for_blocks_that_fails_is_a_layout_error() -> None:
    def broken() -> Any:
        raise AttributeError("no such part")

    model = build("llama")
    model.model.get_decoder = broken
    with pytest.raises(LayoutError, match=r"of LlamaForCausalLM failed: .*no such part.*find_model_layout") as caught:
        find_layout(model)
    assert isinstance(caught.value.__cause__, AttributeError)


def test_an_interruption_is_not_caught(tmp_path: Path) -> None:
    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    model = peft_model()
    model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(on_failure="keep"))).train()
