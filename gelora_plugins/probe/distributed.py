"""Processes that measure together: the first one reads the documents and decides, each runs its share of the batches.

Whatever fails in one of them fails in all, at the next point where they meet, and none is left waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import should_reduce_batch_size

from gelora_plugins.errors import GeLoRAError, ProbeError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of the default group of `torch.distributed`. All of them make the same calls, in the same order.

    Attributes:
        index: the number of this process; the first is 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def all(cls) -> Self:
        """Every process of this run, or this one alone where there are no others."""
        state = PartialState()
        return cls(state.process_index, state.num_processes)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What runs inside succeeds in every process, or an error is raised in every process.

        Where memory ran out in one, and nothing worse happened, all get an error that says so in PyTorch's words.

        Raises:
            ProbeError: another process failed; it is named, with its error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            if self.count == 1:
                raise
            error = caught
        if self.count == 1:
            return
        mine = None if error is None else (f"{type(error).__name__}: {error}", should_reduce_batch_size(error))
        failed = {i: outcome for i, outcome in enumerate(gather_object([mine])) if outcome is not None}
        fatal = {i: outcome for i, outcome in failed.items() if not outcome[1]}
        if error is not None and (self.index in fatal or not fatal):
            raise error
        for i, (text, _) in fatal.items():
            raise ProbeError(f"Process {i} of {self.count} failed while measuring: {text}")
        for i, (text, _) in failed.items():
            raise RuntimeError(f"Process {i} of {self.count}: {text}")

    def decide(self, function: Callable[[], T]) -> T:
        """What `function` gives in the first process, in every process."""
        result: list[Any] = [None]
        with self.together():
            if self.index == 0:
                result = [function()]
        return result[0] if self.count == 1 else broadcast_object_list(result)[0]  # type: ignore[no-any-return]

    def share(self, batches: Iterable[T]) -> Iterator[T | None]:
        """The first process's `batches`, dealt round: every `count`-th for each process, or None where none is left."""
        source = iter(batches)
        while hand := self.decide(lambda: list(islice(source, self.count))):
            yield hand[self.index] if self.index < len(hand) else None

    def gather(self, value: T | None) -> list[T]:
        """In the first process the values of all, in their order, without None; in the others nothing."""
        if self.count == 1:
            return [] if value is None else [value]
        from torch.distributed import gather_object as gather_to_one

        values: list[Any] | None = [None] * self.count if self.index == 0 else None
        gather_to_one(value, values, dst=0)
        return [found for found in values or () if found is not None]


ALONE = Processes()


@contextmanager
def blaming(what: str, advice: str) -> Iterator[None]:
    """Whatever the user's model or data raise inside becomes a ProbeError that says `what` failed, with its cause.

    Errors of GeLoRA stay as they are, and so does memory that ran out: whoever called may do with less.

    Raises:
        ProbeError: something failed; `advice` is its last sentence.
    """
    try:
        yield
    except GeLoRAError:
        raise
    except Exception as error:
        if should_reduce_batch_size(error):
            raise
        raise ProbeError(f"{what} failed: {type(error).__name__}: {str(error).rstrip('.')}. {advice}") from error
