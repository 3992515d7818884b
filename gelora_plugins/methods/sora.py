"""SoRA (Ding et al., EMNLP 2023, arXiv 2311.11696): gates that a proximal step brings to 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gelora_plugins.methods.base import expect, generator
from gelora_plugins.methods.gate_budget import BudgetedGates

logger = logging.getLogger(__name__)

THRESHOLDS, INITS, SCHEDULES = ("soft", "official"), ("normal", "ones"), ("constant", "lr", "ramp")


@dataclass(eq=False)
class SoRA(BudgetedGates):
    """Learn a gate g for each rank, ΔW = s B diag(g) A, shrink every gate by ξ after each step, and prune those at 0.

    ξ = `shrinkage` / T in a training of T steps. A gate can lose `shrinkage` in all, and gains no more than about its
    learning rate in a step: where ξ is above that, all die whatever the data say. Published runs have a shrinkage of
    2.9 and 4.3 over more than ten thousand steps. A gate at 0 may return, as its gradient does not vanish there.

    With `keep` or `budget` the number that is left is bounded, too, which SoRA does not have: the gates that are
    weakest by |g| · ||A_i|| · ||B_i|| are set to 0 on AdaLoRA's schedule. Never are more left than survive by
    themselves.

    The full text was not available; this is after the published code, whose threshold is not that of its formula: it
    takes ξ off, and then sets to 0 what is below ξ, so that all up to 2 ξ is gone, and leaves |g| = ξ as it is
    (`threshold="official"`). Its staged schedules go on with a learning rate of 0; schedule "ramp" is in their place.

    Attributes:
        shrinkage: what a gate loses over the training with schedule "constant".
        schedule: ξ is the same in all steps; goes with the learning rate ("lr", as the formula has it); or grows from
            0 to `shrinkage` / T ("ramp", half as much in all).
        threshold: "soft", sign(g) max(|g| - ξ, 0), or "official".
        l1: λ; λ/N · sign(g) is added to the gradient of the N gates, as the published code does besides ξ.
        init: "normal" from N(0, `deviation`²), "ones".

    Raises:
        ConfigError: a value is out of range.
        MethodError: see `BudgetedGates`.
    """

    name: ClassVar[str] = "sora"

    keep: float | None = None
    shrinkage: float = 3.0
    schedule: str = "constant"
    threshold: str = "soft"
    l1: float = 0.0
    init: str = "normal"
    deviation: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("shrinkage", "l1", "deviation"):
            expect(0 <= getattr(self, option) < math.inf, option, getattr(self, option), "0 or more")
        for option, known in (("schedule", SCHEDULES), ("threshold", THRESHOLDS), ("init", INITS)):
            expect(getattr(self, option) in known, option, getattr(self, option), f"one of: {', '.join(known)}")

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """See `BudgetedGates.begin`; and warn where no gate can survive."""
        super().begin(saved)
        step = self.shrinkage / self.state.max_steps
        fastest = self.gate_lr * max(_peak(group, self.args.learning_rate) for group in self.groups())
        if step > fastest > 0:
            logger.warning(
                "sora takes %.2g from each gate in a step, and a step of AdamW gives back %.2g at most: all gates may "
                "come to 0 whatever the data say. Train for more steps, or with a lower shrinkage or a higher gate_lr.",
                step,
                fastest,
            )

    def draw(self) -> Tensor:
        """The gates of each module from a seed of its own."""
        if self.init == "ones":
            return torch.ones(sum(self.sizes))
        sources = [generator(self.args.seed, 0, pair.name) for pair in self.pairs]
        drawn = [torch.randn(size, generator=s) for size, s in zip(self.sizes, sources, strict=True)]
        return self.deviation * torch.cat(drawn)

    def regularise(self) -> None:
        """Add λ/N · sign(g)."""
        if self.l1 and self.gates.grad is not None:
            self.gates.grad.add_(self.gates.detach().sign(), alpha=self.l1 / len(self.gates))

    def after_step(self, step: int) -> None:
        """Shrink the gates; then bound their number, where that is asked for."""
        shrunk = soft_threshold if self.threshold == "soft" else official_threshold
        self.gates.copy_(shrunk(self.gates.detach(), self._amount(step)))
        self.shrink(step)

    def scores(self) -> Tensor:
        """|g| · ||A_i|| · ||B_i||."""
        norms = [
            (raw.float().norm(dim=1) * pair.b.detach().float().norm(dim=0)).to(self.gates.device)
            for pair, raw in zip(self.pairs, self.raw, strict=True)
        ]
        return self.gates.detach().abs() * torch.cat(norms)

    def _amount(self, step: int) -> Tensor:
        """ξ of each gate."""
        steps = self.state.max_steps
        if self.schedule == "lr":
            shares = [group["lr"] / (_peak(group, self.args.learning_rate) or 1.0) for group in self.groups()]
        else:
            shares = [(step + 1) / steps if self.schedule == "ramp" else 1.0] * len(self.pairs)
        return self.spread([self.shrinkage / steps * float(share) for share in shares])


def soft_threshold(gates: Tensor, amount: Tensor) -> Tensor:
    """sign(g) max(|g| - ξ, 0): the proximal step of ξ |g|."""
    return gates.sign() * (gates.abs() - amount).clamp(min=0)


def official_threshold(gates: Tensor, amount: Tensor) -> Tensor:
    """What the published code does: ξ is taken off where |g| is above it, and then all below ξ is set to 0."""
    shrunk = torch.where(gates.abs() > amount, gates - gates.sign() * amount, gates)
    return torch.where(shrunk.abs() < amount, torch.zeros_like(shrunk), shrunk)


def _peak(group: Mapping[str, float], otherwise: float) -> float:
    """The learning rate that the schedule of a group multiplies."""
    return float(group.get("initial_lr", otherwise))
