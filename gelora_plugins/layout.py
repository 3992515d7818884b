"""Where the transformer blocks of a model are: ModelLayout. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from gelora_plugins import json_files
from gelora_plugins.errors import PlanError


@dataclass(frozen=True)
class Linear:
    """A linear map inside a block: module path, and the sizes of its input and output."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Block:
    """A transformer block: module path, and the linear maps inside it in module order."""

    name: str
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class ModelLayout:
    """The transformer blocks of a model, in the order in which hidden states pass through them.

    All module paths count from the model itself, without the wrapper that PEFT puts around it.

    Attributes:
        model_type: `config.model_type` of the model, for messages and for telling plans apart.
        backbone: path of the module that is called to probe: the model without its head; "" is the model.
        stacks: one tuple of blocks per stack: one for a decoder or an encoder, encoder then decoder for both.
            A stack of L blocks has L + 1 boundaries.
    """

    model_type: str
    backbone: str
    stacks: tuple[tuple[Block, ...], ...]

    def __post_init__(self) -> None:
        if not self.stacks or not all(self.stacks):
            raise PlanError("A model layout needs at least one block in every stack.")
        names = [block.name for block in self.blocks]
        if len(set(names)) != len(names):
            raise PlanError("Two blocks of a model layout have the same name.")

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, stack after stack."""
        return tuple(block for stack in self.stacks for block in stack)

    @property
    def num_boundaries(self) -> int:
        """Boundaries of all stacks: L + 1 for a stack of L blocks."""
        return sum(len(stack) + 1 for stack in self.stacks)

    def block_boundaries(self) -> Iterator[tuple[int, int]]:
        """(input boundary, output boundary) of each block, in the order of `blocks`."""
        first = 0
        for stack in self.stacks:
            for i in range(len(stack)):
                yield first + i, first + i + 1
            first += len(stack) + 1

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Inverse of `dataclasses.asdict`. Raises PlanError for anything else."""
        get = json_files.reader(data, "layout")
        stacks = []
        for stack in get("stacks", list):
            if not isinstance(stack, list):
                raise PlanError("layout.stacks is not a list of lists of blocks.")
            stacks.append(tuple(_block_from_dict(block) for block in stack))
        return cls(get("model_type", str), get("backbone", str), tuple(stacks))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def _block_from_dict(data: Any) -> Block:
    get = json_files.reader(data, "block")
    linears = []
    for linear in get("linears", list):
        read = json_files.reader(linear, "linear")
        linears.append(Linear(read("name", str), read("in_features", int), read("out_features", int)))
    return Block(get("name", str), tuple(linears))
