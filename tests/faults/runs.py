"""What support/forks.py runs in processes of its own: a tiny training, killed at a chosen moment, and more."""

import json
import os
import signal
import sys
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import Trainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig, pipeline
from gelora_plugins.pipeline import select_ranks
from gelora_plugins.ranks.adapter import apply_plan
from gelora_plugins.report.rank_report import RankReport
from tests.support.plans import make_plan
from tests.support.training import peft_model, ranks_by_block, trainer_for

STEPS = 6
# What happens from the first call of one function to the last return of it.
PHASES = {
    "probe": select_ranks,
    "apply": apply_plan,
    "report": RankReport.write,
    "steps": Trainer.training_step,
    "checkpoint": Trainer._save_checkpoint,
}
FUNCTIONS = {function.__code__: name for name, function in PHASES.items()}
# Where a phase has another name than its function, the function and which of its calls it is.
CALLS = {"first checkpoint": ("checkpoint", 0), "second checkpoint": ("checkpoint", 1)}


class Moments:
    """A profile function for `sys.setprofile`: a moment is the number of calls and returns, of Python and of C.

    It kills the process so many moments after a phase began: counted from there, what came before may take longer or
    shorter from run to run.
    """

    def __init__(self, kill_at: tuple[str, int] | None = None) -> None:
        phase, self.after = kill_at or ("", 0)
        self.function, self.call = CALLS.get(phase, (phase, 0))
        self.now = 0
        self.last: int | None = None
        self.phases: dict[str, list[int]] = {}

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        self.now += 1
        if self.now == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        name = FUNCTIONS.get(frame.f_code) if event in ("call", "return") else None
        if name is not None:
            moments = self.phases.setdefault(name, [])
            moments.append(self.now)
            if name == self.function and len(moments) == 2 * self.call + 1:
                self.last = self.now + self.after


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


def train(
    directory: Path, moments: Moments | None = None, policy: str = "budget", saving: bool = True, steps: int = STEPS
) -> None:
    """The user's script: train, from the last checkpoint when there is one."""
    measured: list[int] = []
    measure = pipeline.measure
    pipeline.measure = lambda *args, **kwargs: measured.append(1) or measure(*args, **kwargs)
    options = {"max_steps": steps, "save_strategy": "steps" if saving else "no", "save_steps": 2}
    options |= {"lr_scheduler_type": "constant", "disable_tqdm": False}
    trainer = trainer_for(peft_model(), directory, GeLoRACallback(GeLoRAConfig(policy=policy)), **options)
    checkpoint = last_whole_checkpoint(directory)
    sys.setprofile(moments)
    trainer.train(resume_from_checkpoint=checkpoint)
    sys.setprofile(None)
    found = {
        "ranks": ranks_by_block(trainer.model),
        "measured": len(measured),
        "resumed": checkpoint is not None,
        "phases": {} if moments is None else moments.phases,
    }
    (directory / f"found-{policy}.json").write_text(json.dumps(found))


def write_until(path: Path, ranks: tuple[int, ...], enough: Event) -> None:
    """Save the test plan with these ranks again and again."""
    plan = make_plan(ranks=ranks)
    while not enough.is_set():
        plan.save(path)
