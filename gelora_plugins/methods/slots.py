"""Chains of adapters in one: a slot is a range of ranks, and each part of the training trains one slot of a module.

Finished slots act as a merged weight, and future ones have lora_B = 0 and add nothing: this is to merge and to draw
anew, with base weights that nobody touches. PEFT 0.21 draws lora_A from ±1/sqrt(in_features) whatever the rank, so to
draw all rows at once is to draw each slot's when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import TrainingMethod, forget


class Part(NamedTuple):
    """A part of the training: its first step, and the ranks [first, end) that each module trains in it."""

    start: int
    slots: dict[str, tuple[int, int]]


class SlotMethod(TrainingMethod):
    """Trains a slot of each module at a time, and the optimizer begins anew with each.

    Gradients outside the slot are 0 before they are clipped, so their norm is the slot's. Ranks outside it are put back
    after each step, which weight decay would move. What is trained beside the adapter is trained throughout.

    A subclass writes `parts`.
    """

    fresh_only: ClassVar[bool] = True
    inits: ClassVar[tuple[Any, ...]] = (True,)

    restart: bool

    def parts(self, steps: int) -> list[Part]:
        """The parts of a training of `steps` steps in order; the first starts at 0. Raises MethodError where there
        are none."""
        raise NotImplementedError

    def check(self) -> None:
        """A schedule is needed, and slots that are seen in every forward pass as merged weights would be."""
        if self.adapter.config.lora_dropout:
            raise MethodError(
                f"{self.name} keeps what is trained in the adapter, where it would be dropped by lora_dropout="
                f"{self.adapter.config.lora_dropout}, as nothing merged would be. Use lora_dropout=0."
            )
        self._parts = self.parts(self.state.max_steps)
        if self.restart:
            check_schedule(self.scheduler, self.args, self.state.max_steps)

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """Nothing is kept but the schedule itself: where a slot begins and ends follows from the step."""
        self._hooks: list[Any] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._lambdas: list[Any] | None = None
        if saved is not None and not self._is_schedule_of(saved):
            raise MethodError(
                f"{self.name} had another schedule when the checkpoint was written: max_steps, seed or ranks have "
                "changed. Resume with those of the checkpoint, or start anew."
            )
        for pair in self.pairs:
            matrices: tuple[tuple[Any, int], ...] = ((pair.a, 0), (pair.b, 1))
            self._hooks += [matrix.register_hook(self._mask(pair.name, dim)) for matrix, dim in matrices]
        self._enter(max(k for k, part in enumerate(self._parts) if part.start <= self.state.global_step))
        if self.restart:
            self._restart()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where a part begins, turn to its slots, and forget the moments of those before."""
        if not self._running:
            return
        for k, part in enumerate(self._parts):
            if part.start == state.global_step:
                self._enter(k)
                forget(self.optimizer, (matrix for pair in self.pairs for matrix in (pair.a, pair.b)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put back what the optimizer has moved outside the slots, such as by weight decay."""
        if not self._running:
            return
        with torch.no_grad():
            for pair, (a, b) in zip(self.pairs, self._kept, strict=True):
                first, end = self._slots[pair.name]
                pair.a[:first], pair.a[end:] = a[:first], a[end:]
                pair.b[:, :first], pair.b[:, end:] = b[:, :first], b[:, end:]

    def close(self) -> None:
        """Gradients are whole again, and the schedule is the Trainer's."""
        for hook in self._hooks:
            hook.remove()
        if self._lambdas is not None:
            self.scheduler.lr_lambdas = self._lambdas
        self._hooks.clear()
        self._kept.clear()

    def saved(self) -> dict[str, Tensor]:
        """The schedule."""
        return {
            "starts": torch.tensor([part.start for part in self._parts]),
            "slots": torch.tensor([[part.slots[pair.name] for pair in self.pairs] for part in self._parts]),
        }

    def _is_schedule_of(self, saved: Mapping[str, Tensor]) -> bool:
        return all(name in saved and tensor.equal(saved[name]) for name, tensor in self.saved().items())

    def _enter(self, k: int) -> None:
        self._slots = self._parts[k].slots
        self._kept = [(pair.a.detach().clone(), pair.b.detach().clone()) for pair in self.pairs]

    def _mask(self, name: str, dim: int) -> Callable[[Tensor], Tensor]:
        def inside(gradient: Tensor) -> Tensor:
            first, end = self._slots[name]
            masked = torch.zeros_like(gradient)  # and not a product: it would make NaN of infinities outside
            masked.narrow(dim, first, end - first).copy_(gradient.narrow(dim, first, end - first))
            return masked

        return inside

    def _restart(self) -> None:
        """The schedule of the arguments, once in each part; its warm-up, too."""
        starts = [part.start for part in self._parts]
        lengths = [end - start for start, end in zip(starts, [*starts[1:], self.state.max_steps], strict=True)]
        made = {length: schedule(self.args, self.scheduler.optimizer, length) for length in lengths}

        def factor(step: int) -> float:
            k = max(k for k, start in enumerate(starts) if start <= step)
            return made[lengths[k]](step - starts[k])

        self._lambdas = self.scheduler.lr_lambdas
        self.scheduler.lr_lambdas = [factor for _ in self._lambdas]
        # The rate of the first step was set when the schedule was made.
        rates = [base * factor(self.scheduler.last_epoch) for base in self.scheduler.base_lrs]
        for group, rate in zip(self.scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.scheduler._last_lr = rates  # which is what is logged


def schedule(args: Any, optimizer: Any, steps: int) -> Callable[[int], float]:
    """step -> factor of the learning rate, as a Trainer with these arguments and so many steps has it."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=optimizer.defaults["lr"])
    made = get_scheduler(
        args.lr_scheduler_type,
        stand_in,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    factor: Callable[[int], float] = made.lr_lambdas[0]
    return factor


def check_schedule(scheduler: Any, args: Any, steps: int) -> None:
    """Raises MethodError unless the schedule is known as a function of the step, so that it can be run in a part."""
    known = isinstance(scheduler, LambdaLR)
    if known:
        expected = schedule(args, scheduler.optimizer, steps)
        known = all(own(t) == expected(t) for own in scheduler.lr_lambdas for t in range(steps))
    if not known:
        raise MethodError(
            f"restart runs the schedule of the arguments (lr_scheduler_type) in each part, and the Trainer's "
            f"{type(scheduler).__name__} is another. Set it in the arguments, or use restart=False."
        )
