"""Processes under torchrun (DDP, gloo): they share the measurement, have one plan, train alike, and end together."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins import GeLoRAConfig, RankPlan, select_ranks
from tests.training import peft_model, rows, saved_plan

ROOT = Path(__file__).parents[2]
BOUND = 120  # seconds, of which most go to the imports; a process that waits for another in vain waits half an hour
TRAINING = """
import json, os, sys
from pathlib import Path
import torch
from gelora_plugins import GeLoRACallback, GeLoRAConfig
from tests.training import Watch, matrices, peft_model, ranks_by_block, trainer_for

directory, rank = Path(sys.argv[1]), os.environ["RANK"]
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
    "digests": {name: value.double().sum().item() for name, value in after.items()},
}
(directory / f"measured-{rank}.json").write_text(json.dumps([n for n in batches if n > 1]))  # training has 1 row a step
(directory / f"found-{rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()  # gloo aborts a process (torch 2.13) whose peer is gone while its threads still run
torch.distributed.destroy_process_group()
"""
FAILING = """
import os, sys
from pathlib import Path
from gelora_plugins import GeLoRACallback, GeLoRAConfig, GeLoRAError
from tests.integration.test_processes import fail
from tests.training import peft_model, rows, trainer_for

directory, rank, how, where = Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2], int(sys.argv[3])
options = {"train_dataset": [{"document": i} for i in range(120)], "remove_unused_columns": False}
documents = rows()

def collator(some):
    if how == "collator" and rank == where:
        raise KeyError("a field")
    import torch
    ids = [documents[row["document"]]["input_ids"] for row in some]
    width = max(map(len, ids))
    mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids])
    ids = torch.tensor([one + [0] * (width - len(one)) for one in ids])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}

model = peft_model()
fail(model, how if rank == where else "never", directory / f"began-{rank}")
trainer = trainer_for(model, directory, GeLoRACallback(GeLoRAConfig()), data_collator=collator, **options)
try:
    trainer.train()
    (directory / f"trained-{rank}").write_text("")
except GeLoRAError as error:
    (directory / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
import torch
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def fail(model, how, began):
    """Make the second batch of the probe fail."""
    import signal

    import torch

    calls = []

    def hook(module, args):
        calls.append(1)
        began.write_text("")
        if how == "killed" and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error" and len(calls) == 2:
            raise ValueError("in the second batch")
        if how == "memory" and len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")

    model.get_base_model().model.layers[1].register_forward_pre_hook(hook)


def torchrun(directory: Path, processes: int, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = directory / "script.py"
    script.write_text(source)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, str(script), str(directory), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def alone() -> RankPlan:
    return select_ranks(peft_model(), rows(), GeLoRAConfig(policy="budget"), progress=False)


def assert_same(found: Any, expected: Any) -> None:
    """Equal in everything but the last digits of a number: sums of equal numbers depend on where memory lies."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"seconds"}:
            assert_same(found[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert found == (pytest.approx(expected, rel=1e-12) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_work_have_the_plan_of_one_and_train_alike(tmp_path, count, alone):
    done = torchrun(tmp_path, count, TRAINING)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(count)]
    assert [one["processes"] for one in found] == [count] * count
    assert all(one == found[0] for one in found)
    assert found[0]["still"] == []
    assert saved_plan(tmp_path).ranks == alone.ranks
    assert_same(saved_plan(tmp_path).to_dict(), alone.to_dict())
    assert set(alone.ranks) != {4}
    assert tuple(found[0]["ranks"]) == alone.ranks[:: len(alone.ranks) // 3]
    assert done.stdout.count("LoRA ranks by GeLoRA") == 1
    measured = [json.loads((tmp_path / f"measured-{rank}.json").read_text()) for rank in range(count)]
    batches = [16] * 7 + [8]
    assert measured == [batches[rank::count] for rank in range(count)]


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_words(tmp_path, where):
    done = torchrun(tmp_path, 2, FAILING, "error", str(where))
    assert done.returncode == 1
    assert "ValueError: in the second batch" in done.stderr
    other = (tmp_path / f"error-{1 - where}").read_text()
    assert other == f"ProbeError: Process {where} of 2 failed while measuring: ValueError: in the second batch"


def test_an_error_in_the_collator_of_the_process_that_reads_ends_all_with_its_words(tmp_path):
    done = torchrun(tmp_path, 2, FAILING, "collator", "0")
    assert done.returncode == 0, done.stderr
    words = "ProbeError: The data collator failed on rows with the fields document: KeyError: 'a field'. "
    assert (tmp_path / "error-0").read_text().startswith(words)
    assert (tmp_path / "error-1").read_text().startswith(f"ProbeError: Process 0 of 2 failed while measuring: {words}")


def test_memory_that_runs_out_in_one_process_halves_the_batches_of_all(tmp_path):
    done = torchrun(tmp_path, 2, FAILING, "memory", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trained-0").exists()
    assert (tmp_path / "trained-1").exists()
    assert done.stderr.count("trying again with 8 documents in a batch") == 2
    assert done.stderr.count("trying again with 4 documents in a batch") == 2


@pytest.mark.parametrize("where", [0, 1])
def test_a_process_that_is_killed_while_measuring_ends_the_others_soon(tmp_path, where):
    started = time.monotonic()
    done = torchrun(tmp_path, 2, FAILING, "killed", str(where))
    assert time.monotonic() - started < BOUND
    assert done.returncode == 1
    assert (tmp_path / f"began-{where}").exists()
    assert not (tmp_path / f"trained-{1 - where}").exists()
    assert not (tmp_path / "gelora").exists()
