"""A Trainer run in a process of its own that dies by SIGKILL, and is run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import PeftConfig

from tests.training import saved_plan

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from gelora_plugins import GeLoRACallback, GeLoRAConfig
from tests.training import peft_model, trainer_for

directory, steps, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"
callback = GeLoRACallback(GeLoRAConfig(policy="budget"))
options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
trainer_for(peft_model(), directory, callback, disable_tqdm=False, **options).train(resume_from_checkpoint=resume)
"""


def command(directory: Path, steps: int, how: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(directory), str(steps), how]


def run(directory: Path, steps: int, how: str) -> str:
    done = subprocess.run(command(directory, steps, how), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def losses(checkpoint: Path) -> dict[int, float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed some time after its first checkpoint."""
    directory = tmp_path_factory.mktemp("killed")
    process = subprocess.Popen(command(directory, 100_000, "fresh"), cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (directory / "checkpoint-4").is_dir():  # so that checkpoint-2 is whole
        assert process.poll() is None, "the run ended before its second checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for checkpoint in directory.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-2":  # one of them may have been half written
            checkpoint.rename(directory / f"later-{checkpoint.name}")
    return directory


def test_it_goes_on_with_the_same_ranks_and_losses_and_measures_nothing(killed: Path, tmp_path: Path) -> None:
    plan = saved_plan(killed)
    written = (killed / "gelora" / "plan.json").stat().st_mtime_ns
    said = run(killed, 6, "resume")
    assert "restored the ranks of the checkpoint" in said
    assert "GeLoRA probe" not in said
    assert (killed / "gelora" / "plan.json").stat().st_mtime_ns == written
    assert "GeLoRA probe" in run(tmp_path, 6, "fresh")
    for directory in (killed, tmp_path):
        config = PeftConfig.from_pretrained(directory / "checkpoint-6")
        assert config.rank_pattern == plan.rank_pattern()
    assert losses(killed / "checkpoint-6") == pytest.approx(losses(tmp_path / "checkpoint-6"), abs=1e-4)
    assert len(losses(killed / "checkpoint-6")) == 6
