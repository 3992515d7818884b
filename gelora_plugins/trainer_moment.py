"""The two reaches into a Trainer (transformers 5.23 has no other way): its constructor's frame, and four methods."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from gelora_plugins.errors import TooLateError

HOW_TO_ATTACH = "Pass it when the Trainer is made: Trainer(..., callbacks=[GeLoRACallback()])."


class Methods(NamedTuple):
    """Of a Trainer: what begins training, makes a trial's model, saves the adapter, writes its card."""

    train: Callable[..., Any]
    call_model_init: Callable[..., Any]
    save_model: Callable[..., Any]
    create_model_card: Callable[..., Any]


def replace_methods(trainer: Trainer, methods: Methods) -> Methods:
    """Put `methods` in the place of the trainer's own, which are returned.

    No callback runs before `train()` has loaded the checkpoint and made the optimizer, none is given a trial's model
    before it is wrapped, none can write beside the adapter before the checkpoint is complete, and none runs between the
    writing of a model card and its upload.
    """
    originals = Methods(*(getattr(trainer, name) for name in Methods._fields))
    for name, method in methods._asdict().items():
        setattr(trainer, name, method)
    return originals


def trainer_being_made(callback: TrainerCallback) -> Trainer:
    """The Trainer whose constructor is calling: `on_init_end` is not given it (transformers 5.23)."""
    for frame in _frames():
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
    raise TooLateError(f"on_init_end was not called by a Trainer that has this callback. {HOW_TO_ATTACH}")


def checkpoint_path(trainer: Trainer, resume_from_checkpoint: Any) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint)` takes; None where it starts anew."""
    if isinstance(resume_from_checkpoint, bool):
        # Where there is none the Trainer says so itself.
        return get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint else None
    return None if resume_from_checkpoint is None else os.fspath(resume_from_checkpoint)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
