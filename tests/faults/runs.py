"""A tiny training that can be killed at a chosen moment. Imported once by a fork server, so that a run is quick."""

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib.figure  # noqa: F401  # the report's picture; importing it in every run takes longer than the run
from transformers import Trainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.adapter import apply_plan
from gelora_plugins.pipeline import select_ranks
from gelora_plugins.report import RankReport
from tests.plans import make_plan
from tests.training import peft_model, ranks_by_block, trainer_for

STEPS = 6
# What happens from the first call of one function to the last return of it.
PHASES = {
    "probe": select_ranks,
    "apply": apply_plan,
    "report": RankReport.write,
    "steps": Trainer.training_step,
    "checkpoint": Trainer._save_checkpoint,
}


class Moments:
    """A profile function for `sys.setprofile`: a moment is the number of calls and returns, of Python and of C."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.now = 0
        self.phases: dict[str, list[int]] = {}
        self._codes = {function.__code__: name for name, function in PHASES.items()}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        self.now += 1
        if self.now == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if event in ("call", "return") and frame.f_code in self._codes:
            self.phases.setdefault(self._codes[frame.f_code], []).append(self.now)


def last_whole_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint whose last file is whole: transformers 5.23 writes checkpoints in place."""
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in directory.glob("checkpoint-*"))
    for step in reversed(steps):
        state = directory / f"checkpoint-{step}" / "trainer_state.json"
        try:
            json.loads(state.read_text())
        except (OSError, ValueError):
            continue
        return str(state.parent)
    return None


def train(directory: Path, kill_at: int | None = None, policy: str = "budget", saving: bool = True) -> None:
    """The user's script: train, from the last checkpoint when there is one. Output goes to log.txt."""
    directory.mkdir(exist_ok=True)
    with open(directory / "log.txt", "a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    options = {"max_steps": STEPS, "save_strategy": "steps" if saving else "no", "save_steps": 2}
    trainer = trainer_for(peft_model(), directory, GeLoRACallback(GeLoRAConfig(policy=policy)), **options)
    checkpoint = last_whole_checkpoint(directory)
    moments = Moments(kill_at)
    sys.setprofile(moments)
    trainer.train(resume_from_checkpoint=checkpoint)
    sys.setprofile(None)
    found = {"ranks": ranks_by_block(trainer.model), "phases": moments.phases, "resumed": checkpoint is not None}
    (directory / f"found-{policy}.json").write_text(json.dumps(found))


def write_often(path: Path, ranks: tuple[int, ...], times: int) -> None:
    """Save the test plan with these ranks again and again."""
    plan = make_plan(ranks=ranks)
    for _ in range(times):
        plan.save(path)
