"""Two processes under torchrun (DDP, gloo): one plan, and adapters that train alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

from gelora_plugins import GeLoRAConfig, select_ranks
from tests.training import peft_model, rows, saved_plan

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from gelora_plugins import GeLoRACallback, GeLoRAConfig
from tests.training import Watch, matrices, peft_model, ranks_by_block, trainer_for

directory, rank = Path(sys.argv[1]), os.environ["RANK"]
config = GeLoRAConfig(policy="budget", probe_seed=0)
trainer = trainer_for(peft_model(), directory, GeLoRACallback(config), max_steps=5)
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
(directory / f"found-{rank}.json").write_text(json.dumps(found))
torch.distributed.barrier()  # gloo aborts a process (torch 2.13) whose peer is gone while its threads still run
torch.distributed.destroy_process_group()
"""


def test_two_processes_choose_the_ranks_of_one_and_train_alike(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["processes"] for one in found] == [2, 2]
    assert found[0] == found[1]
    assert found[0]["still"] == []
    alone = select_ranks(peft_model(), rows(), GeLoRAConfig(policy="budget"), progress=False)
    assert tuple(found[0]["ranks"]) == saved_plan(tmp_path).ranks == alone.ranks
    assert set(alone.ranks) != {4}
    assert done.stdout.count("LoRA ranks by GeLoRA") == 1
