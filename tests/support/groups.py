"""What each process of a group runs (DDP or FSDP2, gloo) in the tests of processes and of sharded models."""

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from gelora_plugins.integrations.trl import main
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from gelora_plugins import GeLoRACallback, GeLoRAConfig, GeLoRAError, RankPlan
from gelora_plugins.ranks.plan_check import with_plan
from tests.support.methods import METHODS, method_trainer
from tests.support.methods import adapted as method_model
from tests.support.tiny import build
from tests.support.training import LORA, Watch, arguments, matrices, peft_model, ranks_by_block, rows, trainer_for

# In whatever order sums are added up, a step of SGD differs by the rounding of the gradient, while one of AdamW is as
# long for a gradient that is nothing but rounding as for any other.
SGD = {"optim": "sgd"}


def rank() -> int:
    return int(os.environ["RANK"])


def part() -> None:
    """End together: gloo aborts a process (torch 2.13) whose peer is gone while its threads still run."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train(directory: Path) -> None:
    """Measure and train; `measured-RANK.json` has the sizes of the batches, `found-RANK.json` what came of it."""
    model, batches = peft_model(), []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    trainer = trainer_for(model, directory, GeLoRACallback(GeLoRAConfig(policy="budget")), max_steps=5)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    after = matrices(trainer.model)
    found = {
        "processes": trainer.args.world_size,
        "ranks": ranks_by_block(trainer.model),
        "still": [name for name, value in after.items() if value.equal(watch.before[name])],
        "digests": {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in after.items()},
    }
    measured = [size for size in batches if size > 1]  # training has 1 row a step
    (directory / f"measured-{rank()}.json").write_text(json.dumps(measured))
    (directory / f"found-{rank()}.json").write_text(json.dumps(found))
    part()


def train_method(directory: Path, name: str) -> None:
    """Train by the method `name` with two rows a step, however many processes; `found-RANK.pt` has the matrices."""
    batch = 2 // int(os.environ["WORLD_SIZE"])
    trainer = method_trainer(
        method_model(), directory, METHODS[name](), per_device_train_batch_size=batch, max_grad_norm=0.5, **SGD
    )
    trainer.train()
    torch.save(matrices(trainer.model), directory / f"found-{rank()}.pt")
    part()


def sft_command(_: Path, options: list[str]) -> None:
    """`gelora sft` with these options."""
    main(options)


def fail(directory: Path, how: str, where: int) -> None:
    """Process `where` fails while measuring; `ended-RANK` says how each ended, `began-RANK` that it measured."""
    documents = rows()

    def collator(some: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        if how == "collator" and rank() == where:
            raise KeyError("a field")
        tensors = [torch.tensor(documents[row["document"]]["input_ids"]) for row in some]
        ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}

    calls = []

    def hook(module: nn.Module, args: Any) -> None:
        calls.append(1)
        (directory / f"began-{rank()}").write_text("")
        if rank() != where:
            return
        if how == "killed" and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error" and len(calls) == 2:
            raise ValueError("in the second batch")
        if how == "memory" and len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")

    model = peft_model()
    model.get_base_model().model.layers[1].register_forward_pre_hook(hook)
    dataset = [{"document": i} for i in range(len(documents))]
    options = {"train_dataset": dataset, "data_collator": collator, "remove_unused_columns": False}
    trainer = trainer_for(model, directory, GeLoRACallback(GeLoRAConfig()), **options)
    try:
        trainer.train()
        ended = "trained"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"
    (directory / f"ended-{rank()}").write_text(ended)
    if how != "killed":
        part()


def sharded(how: str, directory: Path, **options: Any) -> tuple[TrainingArguments, nn.Module]:
    """What a Trainer needs to shard the model itself (accelerate), or to get it sharded (transformers)."""
    if how == "transformers":
        args = arguments(directory, **SGD)
        assert args.device.type == "cpu"  # reading it starts the processes' group
        sharding = DistributedConfig(fsdp_size=2)
        return args, AutoModelForCausalLM.from_pretrained(directory / "base", distributed_config=sharding)
    efficient = how == "the first alone"  # has the weights, until the model is sharded
    fsdp_config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    fsdp_config["cpu_ram_efficient_loading"] = efficient
    args = arguments(directory, fsdp=True, fsdp_config=fsdp_config, **{**SGD, **options})
    # For MULTI_CPU accelerate 1.15 leaves the FSDP settings out (state.py) and trains under DDP without a word. With
    # another name for the same device and process group all that follows is as on GPUs.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    base = build("llama")
    if efficient and rank() > 0:
        for parameter in base.parameters():
            parameter.data.fill_(torch.nan)  # as good as what is in torch.empty
    return args, base


def adapted(base: nn.Module, plan: Path | None = None) -> PeftModel:
    config = LoraConfig(**LORA)
    torch.manual_seed(0)
    return get_peft_model(base, config if plan is None else with_plan(config, RankPlan.load(plan)))


def train_sharded(directory: Path, how: str) -> None:
    """Train with `plan.json`, which the callback compares with the adapter, and save the adapter.

    `here-RANK.json`: parameter -> (numbers here, numbers in all).
    """
    args, base = sharded(how, directory)
    model, callback = adapted(base, directory / "plan.json"), GeLoRACallback(plan=str(directory / "plan.json"))
    trainer = Trainer(model=model, args=args, train_dataset=rows(), callbacks=[callback])
    trainer.train()
    here = {
        name: [p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()]
        for name, p in trainer.model.named_parameters()
    }
    (directory / f"here-{rank()}.json").write_text(json.dumps(here))
    trainer.save_model(str(directory / "adapter"))
    part()


def train_sharded_with_another_plan(directory: Path, how: str) -> None:
    """Train an adapter that has not the ranks of `plan.json`; `refused-RANK` has the error."""
    args, base = sharded(how, directory)
    callback = GeLoRACallback(plan=str(directory / "plan.json"))
    trainer = Trainer(model=adapted(base), args=args, train_dataset=rows(), callbacks=[callback])
    try:
        trainer.train()
    except GeLoRAError as error:
        (directory / f"refused-{rank()}").write_text(f"{type(error).__name__}: {error}")
    part()


def choose_sharded(directory: Path, how: str) -> None:
    """Measure, train under FSDP2 with checkpoints, save the adapter; then resume from the first checkpoint.

    `found-RANK.json`: the ranks, and the largest difference of the resumed run.
    """
    # torch 2.13 cannot load the state of an optimizer that has none, as SGD's.
    options = {"save_only_model": True, "lr_scheduler_type": "constant"}
    args, base = sharded(how, directory, save_strategy="steps", save_steps=2, **options)
    trainer = Trainer(model=adapted(base), args=args, train_dataset=rows(), callbacks=[GeLoRACallback()])
    trainer.train()
    trainer.save_model(str(directory / "adapter"))
    ended = {name: p.full_tensor() for name, p in trainer.model.named_parameters() if "lora_" in name}
    _, base = sharded(how, directory)
    again = Trainer(model=adapted(base), args=args, train_dataset=rows(), callbacks=[GeLoRACallback()])
    again.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
    resumed = {name: p.full_tensor() for name, p in again.model.named_parameters() if "lora_" in name}
    off = max((resumed[name] - value).abs().max().item() for name, value in ended.items())
    found = {"ranks": ranks_by_block(trainer.model), "off": off}
    (directory / f"found-{rank()}.json").write_text(json.dumps(found))
    part()


def resize_sharded(directory: Path, how: str) -> None:
    """Train a sharded model with the callback; `refused-RANK` has the error."""
    args, base = sharded(how, directory)
    trainer = Trainer(model=adapted(base), args=args, train_dataset=rows(), callbacks=[GeLoRACallback()])
    try:
        trainer.train()
    except GeLoRAError as error:
        (directory / f"refused-{rank()}").write_text(f"{type(error).__name__}: {error}")
    part()
