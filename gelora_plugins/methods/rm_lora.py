"""RM-LoRA (arXiv 2407.12074): LoRA that steps on a random part of the ranks at a time, kept near orthogonal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gelora_plugins.errors import ConfigError
from gelora_plugins.methods.base import Pair, TrainingMethod, generator, orthogonality_gradient

MASKS = ("grad", "update")


@dataclass(eq=False)
class RMLoRA(TrainingMethod):
    """From the second step on, draw for each module and step the ranks whose gradients stay; those of the others are 0.

    Of r ranks max(1, round(share · r)) stay, so a module of rank 1 is never masked. The regulariser adds
    `orthogonality` times the mean over all lora_A and lora_B of ||A A' - I|| and ||B' B - I|| (Frobenius) to the loss.
    Its gradient is added in closed form once a step, whatever the accumulation, and before the mask.

    The equations are those of the official code: the paper's full text was not available. What the code does otherwise:
    its mask also freezes all that is trained beside the adapter; it freezes lora_B after the first step where its
    `lora_type` is neither v1 nor v2; it draws from a global generator that differs between processes; and it clips the
    regulariser's gradient together with the loss's, which here is outside the clipped norm.

    Attributes:
        share: of the ranks that a step moves; the code's settings are 1/2 and 1/4.
        same: lora_A and lora_B are masked alike (the code's v1); else each by a draw of its own (v2).
        mask: "grad" as in the code, where Adam's moments move masked ranks all the same; "update" puts those back.
        orthogonality: weight of the regulariser; the code's are 0 and 0.1.

    Raises:
        ConfigError: a value is out of range.
    """

    name: ClassVar[str] = "rm_lora"

    share: float = 0.5
    same: bool = True
    mask: str = "grad"
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share!r}; expected a number above 0, and 1 at most.")
        if self.mask not in MASKS:
            raise ConfigError(f"mask is {self.mask!r}; expected one of: {', '.join(MASKS)}.")
        if not (math.isfinite(self.orthogonality) and self.orthogonality >= 0):
            raise ConfigError(f"orthogonality is {self.orthogonality!r}; expected 0 or more.")

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """Nothing is kept: the draws follow from seed, step and module."""
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # (rows of ranks, which of them, as they were)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are there, and clipped."""
        if not self._running:
            return
        with torch.no_grad():
            if self.orthogonality:
                self._regularise()
            if state.global_step:
                for pair in self.pairs:
                    self._mask(pair, *self.draw(pair.name, len(pair.a), args.seed, state.global_step))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put back masked ranks that the optimizer has moved."""
        with torch.no_grad():
            for rows, masked, before in self._kept if self._running else ():
                rows[masked] = before
            self._kept = []

    def close(self) -> None:
        """Nothing was borrowed."""
        self._kept = []

    def draw(self, name: str, rank: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """The masked ranks of lora_A and of lora_B of the module `name` at `step`, each (masked,) int64."""
        source, stay = generator(seed, step, name), max(1, round(self.share * rank))
        a = torch.randperm(rank, generator=source)[stay:]
        return a, a if self.same else torch.randperm(rank, generator=source)[stay:]

    def _mask(self, pair: Pair, a: Tensor, b: Tensor) -> None:
        for rows, gradient, masked in (
            (pair.a.data, pair.a.grad, a.to(pair.a.device)),
            (pair.b.data.T, None if pair.b.grad is None else pair.b.grad.T, b.to(pair.b.device)),
        ):
            if gradient is not None:
                gradient[masked] = 0
            if self.mask == "update":
                self._kept.append((rows, masked, rows[masked]))

    def _regularise(self) -> None:
        weight = self.orthogonality / (2 * len(self.pairs))
        for pair in self.pairs:
            if pair.a.grad is not None:
                pair.a.grad += weight * orthogonality_gradient(pair.a)
            if pair.b.grad is not None:
                pair.b.grad += weight * orthogonality_gradient(pair.b.T).T
