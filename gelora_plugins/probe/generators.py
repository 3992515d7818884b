"""Random generators of the user's own: a data set that augments its rows must go on as if nobody had read it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

_INSIDE = ("dataset", "data_collator", "transform")  # names that torch, transformers and torchvision give


@contextmanager
def kept(*owners: Any) -> Iterator[None]:
    """On exit the generators that are attributes of `owners`, or of what these wrap, are in the state that they were.

    A generator that only a closure or a deeper object holds is not seen; it goes on from where the reading left it.
    """
    restorers = [restore for owner in owners for restore in _restorers(owner)]
    try:
        yield
    finally:
        for restore in restorers:
            restore()


def _restorers(owner: Any) -> Iterator[Callable[[], Any]]:
    for name, value in getattr(owner, "__dict__", {}).items():
        if isinstance(value, random.Random):
            yield partial(value.setstate, value.getstate())
        elif isinstance(value, np.random.RandomState):
            yield partial(value.set_state, value.get_state())
        elif isinstance(value, np.random.Generator):
            yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif isinstance(value, torch.Generator):
            yield partial(value.set_state, value.get_state())
        elif name in _INSIDE:
            yield from _restorers(value)
