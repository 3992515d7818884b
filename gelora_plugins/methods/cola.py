"""Chain of LoRA (Xia, Qin, Hazan, arXiv 2401.04151): train a LoRA, tie it into the weights, begin another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import expect
from gelora_plugins.methods.slots import Part, SlotMethod


@dataclass(eq=False)
class COLA(SlotMethod):
    """Train the ranks of the adapter in `knots` parts, one after the other, each with a new optimizer.

    Of a module of rank r knot k trains the ranks from round(k r / knots) to round((k + 1) r / knots); a module of fewer
    ranks than there are knots rests in some. The adapter has all its ranks from the start: a chain of `knots` LoRAs of
    rank r is an adapter of rank knots · r with the same scaling, so with lora_alpha multiplied by `knots`, too.

    Certain is the chain, with LoRA and optimizer drawn anew (abstract). The paper's full text was not available, and
    there is no official code: the number of knots, steps in equal parts and the schedule that restarts are guesses.

    Attributes:
        knots: length of the chain.
        restart: each knot runs the whole schedule of the learning rate, with its warm-up; else it runs once over all.

    Raises:
        ConfigError: a value is out of range.
        MethodError: at the start of training, when it has fewer steps than knots, or the adapter fewer ranks.
    """

    name: ClassVar[str] = "cola"

    knots: int = 3
    restart: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.knots >= 1 and self.knots == int(self.knots), "knots", self.knots, "a whole number of 1 or more")

    def parts(self, steps: int) -> list[Part]:
        """As many parts as knots, as equal as whole steps allow."""
        ranks = {pair.name: len(pair.a) for pair in self.pairs}
        if steps < self.knots or max(ranks.values()) < self.knots:
            raise MethodError(
                f"cola ties {self.knots} knots; the training has {steps} steps, and the highest rank of the adapter is "
                f"{max(ranks.values())}. Each knot needs at least one of both: use fewer knots, or more steps or ranks."
            )
        return [
            Part(share(k, steps, self.knots), {name: self._slot(k, rank) for name, rank in ranks.items()})
            for k in range(self.knots)
        ]

    def _slot(self, k: int, rank: int) -> tuple[int, int]:
        return share(k, rank, self.knots), share(k + 1, rank, self.knots)


def share(k: int, whole: int, parts: int) -> int:
    """round(k · whole / parts), halves up."""
    return (2 * k * whole + parts) // (2 * parts)
