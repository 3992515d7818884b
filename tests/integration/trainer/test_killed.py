"""A Trainer run in a process of its own that dies by SIGKILL, and is run again."""

import json
import signal
import time
from pathlib import Path

import pytest
from peft import PeftConfig

from tests.faults.runs import train
from tests.support.forks import HANGS, start, wait
from tests.support.training import saved_plan


def run(directory: Path, steps: int) -> str:
    """Train in a process of its own, from the last checkpoint when there is one; what it says."""
    log = directory / "log.txt"
    assert wait(start(train, directory, None, "budget", True, steps, log=log)) == 0, log.read_text()
    return log.read_text()


def losses(checkpoint: Path) -> dict[int, float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was killed some time after its first checkpoint."""
    directory = tmp_path_factory.mktemp("killed")
    process = start(train, directory, None, "budget", True, 100_000, log=Path("/dev/null"))
    deadline = time.monotonic() + HANGS
    while not (directory / "checkpoint-4").is_dir():  # so that checkpoint-2 is whole
        assert process.is_alive(), "the run ended before its second checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert wait(process) == -signal.SIGKILL
    for checkpoint in directory.glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-2":  # one of them may have been half written
            checkpoint.rename(directory / f"later-{checkpoint.name}")
    return directory


def test_it_goes_on_with_the_same_ranks_and_losses_and_measures_nothing(killed: Path, tmp_path: Path) -> None:
    plan = saved_plan(killed)
    written = (killed / "gelora" / "plan.json").stat().st_mtime_ns
    said = run(killed, 6)
    assert "restored the ranks of the checkpoint" in said
    assert "GeLoRA probe" not in said
    assert (killed / "gelora" / "plan.json").stat().st_mtime_ns == written
    assert "GeLoRA probe" in run(tmp_path, 6)
    for directory in (killed, tmp_path):
        config = PeftConfig.from_pretrained(directory / "checkpoint-6")
        assert config.rank_pattern == plan.rank_pattern()
    # The same operations on the same numbers in the same order: on one machine they round alike.
    assert losses(killed / "checkpoint-6") == pytest.approx(losses(tmp_path / "checkpoint-6"), abs=1e-4)
    assert len(losses(killed / "checkpoint-6")) == 6
