"""Gates that are taken away until the LoRA parameters that are left fit into a budget, after AdaLoRA's schedule."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import expect
from gelora_plugins.methods.row_gates import RowGates

logger = logging.getLogger(__name__)

START = 1.5  # ranks to begin with, as a multiple of those at the end: AdaLoRA's choice


@dataclass(eq=False)
class BudgetedGates(RowGates):
    """Row gates of which the weakest are set to 0 by and by, over all modules, and pruned at the end.

    Attributes:
        keep: share of the adapter's LoRA parameters that is left at the end; two thirds, as AdaLoRA begins with 1.5
            times its budget. None where `budget` is given.
        budget: LoRA parameters that are left at the end, in place of `keep`.
        min_rank: ranks that stay in each module. 0 is as published: a module may lose all, of which one of zeros is
            left, as LoRA has no rank 0, and is not counted. From 1 on the budget is that of the adapter as it is saved.
        first, last: shares of the training, at its beginning and its end, in which the gates that stay do not change.
        every: share of the training between two choices of them; at least one step.
        kept: (sum of ranks,) bool, the gates that stay; None before the first choice.

    Raises:
        ConfigError: a value is out of range.
        MethodError: the training is too short, or the budget is none for this adapter.
    """

    chooses_ranks: ClassVar[bool] = True
    fresh_only: ClassVar[bool] = True

    keep: float | None = 2 / 3
    budget: int | None = None
    min_rank: int = 0
    first: float = 0.1
    last: float = 0.3
    every: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            expect(0 < self.keep <= 1, "keep", self.keep, "a share above 0 and up to 1")
        if self.budget is not None:
            whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
            expect(whole and self.budget > 0, "budget", self.budget, "a whole number of parameters above 0")
        expect(isinstance(self.min_rank, int) and self.min_rank >= 0, "min_rank", self.min_rank, "a whole number >= 0")
        for option in ("first", "last", "every"):
            expect(0 <= getattr(self, option) < 1, option, getattr(self, option), "a share of at least 0 and below 1")

    # What a subclass writes.

    def scores(self) -> Tensor:
        """How much each rank matters, (sum of ranks,)."""
        raise NotImplementedError

    def planned(self, ranks: Sequence[int], costs: Sequence[int]) -> tuple[Self, tuple[int, ...]]:
        """Begin with half as many ranks again, rounded up, and leave exactly what fits into the parameters of `ranks`.

        No module is emptied then: its rank of zeros would be counted.
        """
        budget = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        method = replace(self, budget=budget, min_rank=max(1, self.min_rank))
        return method, tuple(math.ceil(START * rank) for rank in ranks)

    def check(self) -> None:
        """The budget can be met, and there are steps to meet it in."""
        super().check()
        self.shrinking = None
        if self.keep is None and self.budget is None:
            return
        costs, sizes = self.costs(), [len(pair.a) for pair in self.pairs]
        self._start = sum(size * cost for size, cost in zip(sizes, costs, strict=True))
        share = 1.0 if self.keep is None else self.keep
        self._target = _floor(share * self._start) if self.budget is None else self.budget
        reserved = sum(min(self.min_rank, size) * cost for size, cost in zip(sizes, costs, strict=True))
        if not max(reserved, min(costs)) <= self._target <= self._start:
            raise MethodError(
                f"{self.name} is to leave {self._target} LoRA parameters; the adapter has {self._start}, and at least "
                f"{max(reserved, min(costs))} stay. Set keep or budget, or the ranks to begin with, accordingly."
            )
        self.shrinking = Shrinking.of_shares(self.name, self.state.max_steps, self.first, self.last, self.every)

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """See `RowGates.begin`."""
        super().begin(saved)
        kept = None if saved is None else saved.get("kept")
        self.kept = None if kept is None else kept.to(self.gates.device)

    def saved(self) -> dict[str, Tensor]:
        """Which gates stay, beside what `RowGates` keeps."""
        return super().saved() | ({} if self.kept is None else {"kept": self.kept})

    def shrink(self, step: int) -> None:
        """Set the gates to 0 that do not stay in step `step`; to be called after each."""
        if self.shrinking is None:
            return
        chooses = self.shrinking.masks(step)
        if chooses:
            budget = self.shrinking.budget(step, self._start, self._target)
            stay = strongest(self.scores().tolist(), self.sizes, self.costs(), budget, self.min_rank)
            self.kept = torch.tensor(stay, device=self.gates.device)
        if self.kept is not None and (chooses or step > self.shrinking.end):
            self.gates.masked_fill_(~self.kept, 0)

    def finish(self) -> None:
        """Prune, and say so where what is left is not what was asked for."""
        left = self.prune()
        if self.shrinking is not None and not self._target - max(self.costs()) < left <= self._target:
            logger.warning(
                "%s leaves %d LoRA parameters that add something, and was to leave %d. %s",
                self.name,
                left,
                self._target,
                "The best checkpoint, which was loaded, is from before that."
                if left > self._target
                else "The other gates came to 0 by themselves.",
            )


@dataclass(frozen=True)
class Shrinking:
    """AdaLoRA's schedule (Zhang et al., ICLR 2023, arXiv 2303.10512): when gates are masked, how much stays.

    Attributes:
        steps: of the training; they are counted from 0.
        first: the last step of those at the beginning that leave the ranks alone.
        last: steps after the last choice of what stays.
        every: steps between two choices.
    """

    steps: int
    first: int
    last: int
    every: int

    @classmethod
    def of_shares(cls, method: str, steps: int, first: float, last: float, every: float) -> Shrinking:
        """From shares of the training.

        Raises:
            MethodError: there is no step between the first and the last.
        """
        made = cls(steps, _floor(first * steps), max(1, _floor(last * steps)), max(1, _floor(every * steps)))
        if made.first >= made.end:
            raise MethodError(
                f"{method} chooses ranks after step {made.first} and up to step {made.end} of {steps}: there is none. "
                "Train for more steps, or set `first` and `last`, its shares of them, lower."
            )
        return made

    @property
    def end(self) -> int:
        """The step of the last choice."""
        return self.steps - self.last

    def budget(self, step: int, start: int, target: int) -> int:
        """What may stay in step `step`: `start` at first, `target` from the last choice on, and a cubic between."""
        if step <= self.first:
            return start
        if step > self.end:
            return target
        share = 1 - (step - self.first) / (self.end - self.first)
        return int((start - target) * share**3 + target)

    def masks(self, step: int) -> bool:
        """Whether what stays is chosen anew in step `step`."""
        return step == self.end or (self.first < step < self.end and step % self.every == 0)


def strongest(
    scores: Sequence[float], sizes: Sequence[int], costs: Sequence[int], budget: int, min_rank: int = 0
) -> list[bool]:
    """Which ranks stay: the best `min_rank` of each module, and by descending score each that still fits.

    Where modules cost the same and no two scores are equal these are the ranks above AdaLoRA's kth smallest score.

    Args:
        scores: of all ranks, module by module.
        sizes, costs: ranks of each module, and LoRA parameters of one.
        budget: LoRA parameters.
    """
    module = [m for m, size in enumerate(sizes) for _ in range(size)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best: dict[int, list[int]] = {}
    for i in order:
        best.setdefault(module[i], []).append(i)
    kept = [False] * len(scores)
    for i in [*(i for ranks in best.values() for i in ranks[:min_rank]), *order]:
        if not kept[i] and costs[module[i]] <= budget:
            kept[i] = True
            budget -= costs[module[i]]
    return kept


def _floor(product: float) -> int:
    """Rounded down, but not below a whole number that a product of floats just misses."""
    return math.floor(product + 1e-9)
