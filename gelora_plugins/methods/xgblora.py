"""XGBLoRA (Zhang et al., arXiv 2410.19694): boosting with LoRAs of rank 1 on a few blocks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import expect, generator
from gelora_plugins.methods.cola import share
from gelora_plugins.methods.slots import Part, SlotMethod
from gelora_plugins.plugins import find_layout


@dataclass(eq=False)
class XGBLoRA(SlotMethod):
    """Train the adapter one booster after the other: rank 1 on all target modules of `blocks` blocks.

    The ranks of the adapter decide how often a block is boosted: one of rank r is in r boosters. Each booster takes the
    blocks that have most left, and a draw from the Trainer's seed decides between equals; it is trained for
    max_steps // boosters steps, the last one for what remains. A block's modules of other ranks share out theirs.

    Certain are boosters of rank 1 on randomly chosen blocks, merged and drawn anew (abstract and reviews; 11 of 32
    blocks did best for Llama-3-8B). The paper's full text was not available, and there is no official code: that the
    schedule goes on across boosters, that there is no penalty but weight decay and that the ranks are given are
    guesses. In the paper hundreds of boosters are merged, which no adapter of a budget can hold.

    Attributes:
        blocks: of a booster; None: a third of those with an adapter, or the next smaller number for which the boosters
            come out even.
        restart: each booster runs the whole schedule of the learning rate; else it runs once over all.

    Raises:
        ConfigError: a value is out of range.
        MethodError: at the start of training, when no boosters have these ranks, or it has fewer steps than boosters.
    """

    name: ClassVar[str] = "xgblora"

    blocks: int | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None:
            whole = self.blocks >= 1 and self.blocks == int(self.blocks)
            expect(whole, "blocks", self.blocks, "a whole number of 1 or more, or none")

    def parts(self, steps: int) -> list[Part]:
        """One part a booster."""
        groups = self._groups()
        ranks = [max(modules.values()) for modules in groups.values()]
        boosters = self._boosters(ranks)
        if steps < len(boosters):
            raise MethodError(
                f"xgblora has {len(boosters)} boosters for the {sum(ranks)} ranks of the blocks, and the training has "
                f"{steps} steps. Each booster needs at least one: train longer, with fewer ranks, or with more blocks "
                "in a booster."
            )
        done, parts = [0] * len(ranks), []
        for t, chosen in enumerate(boosters):
            slots = {name: (0, 0) for modules in groups.values() for name in modules}
            for i, (modules, highest) in enumerate(zip(groups.values(), ranks, strict=True)):
                if i in chosen:
                    for name, rank in modules.items():
                        slots[name] = share(done[i], rank, highest), share(done[i] + 1, rank, highest)
                    done[i] += 1
            parts.append(Part(t * (steps // len(boosters)), slots))
        return parts

    def _groups(self) -> dict[str, dict[str, int]]:
        """block -> module -> rank, without blocks that have no adapter."""
        found: dict[str, dict[str, int]] = {block.name: {} for block in find_layout(self.adapter.model).blocks}
        for pair in self.pairs:
            block = next((name for name in found if pair.name.startswith(f"{name}.")), None)
            if block is None:
                raise MethodError(
                    f"xgblora boosts transformer blocks, and {pair.name} is in none. Leave it out of target_modules."
                )
            found[block][pair.name] = len(pair.a)
        return {name: modules for name, modules in found.items() if modules}

    def _boosters(self, ranks: Sequence[int]) -> list[set[int]]:
        most = max(1, round(len(ranks) / 3))
        sizes = range(most, 0, -1) if self.blocks is None else [self.blocks]
        size = next((size for size in sizes if is_possible(ranks, size)), None)
        if size is None:
            possible = [size for size in range(1, len(ranks) + 1) if is_possible(ranks, size)]
            raise MethodError(
                f"No boosters of {self.blocks} blocks give the {len(ranks)} blocks their ranks, which are "
                f"{', '.join(map(str, ranks))}: their sum must be a multiple of blocks, and none may be above sum / "
                f"blocks, the number of boosters. Possible here: blocks={' or '.join(map(str, possible))}."
            )
        return draw(ranks, size, self.args.seed)


def is_possible(ranks: Sequence[int], size: int) -> bool:
    """Whether boosters of `size` distinct blocks can hold each block as often as its rank says."""
    return sum(ranks) % size == 0 and max(ranks) <= sum(ranks) // size


def draw(ranks: Sequence[int], size: int, seed: int) -> list[set[int]]:
    """The blocks of each booster, for `ranks` and `size` that are possible: those with most left, ties by lot."""
    left, boosters = list(ranks), []
    for t in range(sum(ranks) // size):
        lot = torch.randperm(len(left), generator=generator(seed, t, "xgblora")).tolist()
        chosen = sorted(range(len(left)), key=lambda i: (-left[i], lot[i]))[:size]
        for i in chosen:
            left[i] -= 1
        boosters.append(set(chosen))
    return boosters
