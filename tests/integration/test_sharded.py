"""Sharded models (FSDP2, 2 processes, gloo): ranks by the LoRA configuration, and a refusal to resize in place."""

import json
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

from gelora_plugins import RankPlan, select_ranks
from gelora_plugins.lora_config import with_plan
from tests.integration.test_processes import BOUND, torchrun
from tests.tiny import build
from tests.training import LORA, arguments, ranks_by_block, rows, trainer_for

TRAINING = """
import json, os, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from transformers import Trainer
from tests.integration.test_sharded import adapted, sharded
from tests.training import rows

directory, rank = Path(sys.argv[1]), os.environ["RANK"]
args, base = sharded(sys.argv[2], directory)
trainer = Trainer(model=adapted(base, directory / "plan.json"), args=args, train_dataset=rows())
trainer.train()
here = {
    name: [p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()]
    for name, p in trainer.model.named_parameters()
}
(directory / f"here-{rank}.json").write_text(json.dumps(here))
trainer.save_model(str(directory / "adapter"))
torch.distributed.barrier()  # gloo aborts a process (torch 2.13) whose peer is gone while its threads still run
torch.distributed.destroy_process_group()
"""
IN_PLACE = """
import os, sys
from pathlib import Path
import torch
from transformers import Trainer
from gelora_plugins import GeLoRACallback, GeLoRAError
from tests.integration.test_sharded import adapted, sharded
from tests.training import rows

directory = Path(sys.argv[1])
args, base = sharded(sys.argv[2], directory)
trainer = Trainer(model=adapted(base), args=args, train_dataset=rows(), callbacks=[GeLoRACallback()])
try:
    trainer.train()
except GeLoRAError as error:
    (directory / f"refused-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.barrier()  # torchrun ends the other process as soon as one has failed
    torch.distributed.destroy_process_group()
    raise
"""


def sharded(how: str, directory: Path) -> tuple[TrainingArguments, nn.Module]:
    """What a Trainer needs to shard the model itself (accelerate), or to get it sharded (transformers)."""
    if how == "transformers":
        args = arguments(directory)
        assert args.device.type == "cpu"  # reading it starts the processes' group
        sharding = DistributedConfig(fsdp_size=2)
        return args, AutoModelForCausalLM.from_pretrained(directory / "base", distributed_config=sharding)
    fsdp_config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    args = arguments(directory, fsdp=True, fsdp_config=fsdp_config)
    # For MULTI_CPU accelerate 1.15 leaves the FSDP settings out (state.py) and trains under DDP without a word. With
    # another name for the same device and process group all that follows is as on GPUs.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args, build("llama")


def adapted(base: nn.Module, plan: Path | None = None) -> PeftModel:
    config = LoraConfig(**LORA)
    torch.manual_seed(0)
    return get_peft_model(base, config if plan is None else with_plan(config, RankPlan.load(plan)))


@pytest.fixture
def plan(tmp_path) -> RankPlan:
    """A plan made in one process and saved, with the model that it is for."""
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    found = select_ranks(base, rows(), lora_config=LoraConfig(**LORA), progress=False)
    found.save(tmp_path / "plan.json")
    return found


@pytest.mark.parametrize("how", ["accelerate", "transformers"])
def test_a_sharded_model_trains_with_the_ranks_of_a_plan_as_one_that_is_whole(tmp_path, how, plan):
    done = torchrun(tmp_path, 2, TRAINING, how)
    assert done.returncode == 0, done.stderr
    parts = [json.loads((tmp_path / f"here-{rank}.json").read_text()) for rank in range(2)]
    for name, (_, size) in parts[0].items():
        # transformers shards what it loads; the adapter, made later, is whole in every process
        copies = 2 if how == "transformers" and "lora_" in name else 1
        assert sum(part[name][0] for part in parts) == copies * size, name

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert min(plan.ranks) == 1  # fewer rows of lora_A than processes: one of them holds nothing
    assert tuple(ranks_by_block(PeftModel.from_pretrained(build("llama"), tmp_path / "adapter"))) == plan.ranks

    whole = adapted(build("llama"), tmp_path / "plan.json")
    before = {name: value.clone() for name, value in get_peft_model_state_dict(whole).items()}
    trainer_for(whole, tmp_path / "whole", None, gradient_accumulation_steps=2).train()
    after = get_peft_model_state_dict(whole)
    assert saved.keys() == before.keys()
    assert [name for name, value in saved.items() if value.equal(before[name])] == []
    torch.testing.assert_close(saved, dict(after), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["accelerate", "transformers"])
def test_a_sharded_model_is_refused_in_place_in_every_process_with_the_way_out(tmp_path, how):
    build("llama").save_pretrained(tmp_path / "base")
    started = time.monotonic()
    done = torchrun(tmp_path, 2, IN_PLACE, how)
    assert time.monotonic() - started < BOUND
    assert done.returncode == 1
    words = [(tmp_path / f"refused-{rank}").read_text() for rank in range(2)]
    assert words[0] == words[1]
    assert words[0].startswith("ApplyError: The model is sharded, or will be (FSDP or DeepSpeed ZeRO-3)")
    for way_out in ("gelora probe MODEL DATA -o profile.json", "gelora plan profile.json -o plan.json", "LoraConfig("):
        assert way_out in words[0]
    assert not (tmp_path / "gelora").exists()
