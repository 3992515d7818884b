"""Trainings by the methods that change the steps, and what their plain twins are made of."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from gelora_plugins.methods.base import TrainingMethod
from gelora_plugins.methods.cola import COLA
from gelora_plugins.methods.flat_lora import FlatLoRA
from gelora_plugins.methods.lora_pro import LoRAPro
from gelora_plugins.methods.rm_lora import RMLoRA
from gelora_plugins.methods.xgblora import XGBLoRA
from tests.support.groups import part, rank
from tests.support.tiny import VOCABULARY, build
from tests.support.training import LORA, arguments, layers, matrices, rows

STEPS = 6
# Each acts in six steps on the tiny models: three knots, or six boosters of two blocks.
METHODS: dict[str, Callable[[], TrainingMethod]] = {
    "cola": COLA,
    "xgblora": lambda: XGBLoRA(blocks=2),
    "rm_lora": lambda: RMLoRA(orthogonality=0.1),
    "rm_lora update": lambda: RMLoRA(mask="update", same=False),
    "lora_pro": LoRAPro,
    "lora_pro efficient": lambda: LoRAPro(mode="efficient"),
    "flat_lora": FlatLoRA,
    "flat_lora swap": lambda: FlatLoRA(mode="swap"),
}
# The options with which a method is LoRA.
NEUTRAL: dict[str, Callable[[], TrainingMethod]] = {
    "cola": lambda: COLA(knots=1),
    "xgblora": lambda: XGBLoRA(blocks=3),  # on an adapter of rank 1
    "rm_lora": lambda: RMLoRA(share=1),
    "rm_lora update": lambda: RMLoRA(share=1, mask="update"),
    "flat_lora": lambda: FlatLoRA(sigma=0),
    "flat_lora swap": lambda: FlatLoRA(sigma=0, mode="swap"),
}
# Steps in proportion to the gradients, which differ by the rounding of their sums: Adam's would be as long for a
# gradient that is nothing but rounding as for any other.
PROPORTIONAL = {"adam_epsilon": 1.0, "learning_rate": 1.0, "lr_scheduler_type": "constant"}


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A tiny Llama with an adapter whose ranks its three blocks do not share; six boosters of two have them."""
    ranks = {r"^model\.layers\.0\..*": 5, r"^model\.layers\.1\..*": 3}
    alphas = {pattern: 2 * r for pattern, r in ranks.items()}
    torch.manual_seed(0)
    config = LoraConfig(**{**LORA, "rank_pattern": ranks, "alpha_pattern": alphas, **options})
    return get_peft_model(build("llama"), config).to(dtype)


def train(
    model: nn.Module,
    directory: Path,
    *callbacks: TrainerCallback | None,
    resume: Path | None = None,
    optimizers: Any = (None, None),
    **options: Any,
) -> Trainer:
    """A Trainer whose training is over."""
    ours = {name: options.pop(name) for name in ("train_dataset", "eval_dataset") if name in options}
    trainer = Trainer(
        model=model,
        args=arguments(directory, **{"max_steps": STEPS, **options}),
        callbacks=[callback for callback in callbacks if callback is not None],
        optimizers=optimizers,
        **{"train_dataset": rows(), **ours},
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def even_rows(count: int = 48) -> list[dict[str, list[int]]]:
    """Rows of one length, which are the same in whatever batches."""
    return [{"input_ids": ids, "labels": ids} for ids in (row["input_ids"][:4] for row in rows(count))]


class Batches(TrainerCallback):
    """Keeps what the model is called with in training, micro-batch by micro-batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.hook = model.get_base_model().register_forward_pre_hook(
            lambda module, args, kwargs: self.seen.append(dict(kwargs)), with_kwargs=True
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()


def gradients(model: nn.Module, batch: dict[str, Any], largest: float = 1.0) -> None:
    """What a Trainer does before an optimizer step: backward, and clip what is trained."""
    model.zero_grad()
    model(**batch).loss.backward()
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], largest)


def pairs(model: nn.Module) -> Iterator[tuple[str, Any, Any, float, Any]]:
    """(name, A, B, scaling, base layer) of each adapted map; the name counts from below the PeftModel."""
    for name, layer in layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        yield name.removeprefix("base_model.model."), a, b, layer.scaling["default"], layer.get_base_layer()


def products(model: nn.Module) -> dict[str, Tensor]:
    """s B A of each adapted map."""
    return {name: (s * b @ a).detach() for name, a, b, s, _ in pairs(model)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Of each adapted map, as it would be merged."""
    return {name: (base.weight + s * b @ a).detach() for name, a, b, s, base in pairs(model)}


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not value.equal(expected[name])] == []


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    """Equal but for `share` of the largest number there is."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for value in expected.values())
    assert max((value - expected[name]).abs().max().item() for name, value in found.items()) <= share * largest


def train_in_processes(directory: Path, name: str) -> None:
    """In a process of a group; `moved-RANK.pt` has the matrices."""
    batch = 2 // int(os.environ["WORLD_SIZE"])
    options = {**PROPORTIONAL, "per_device_train_batch_size": batch, "train_dataset": even_rows()}
    trainer = train(adapted(), directory, METHODS[name](), **options)
    torch.save(matrices(trainer.model), directory / f"moved-{rank()}.pt")
    (directory / f"processes-{rank()}.json").write_text(json.dumps(trainer.args.world_size))
    part()
