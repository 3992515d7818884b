"""What is done to a model while it is measured, and undone: evaluation mode, no gradients, random state as before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def leaving_no_trace(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; on exit every train/eval flag and all random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    model.eval()
    for module in model.modules():
        # bitsandbytes 0.50: outside training a 4-bit layer repacks its weight for the CPU (with AVX-512 BF16), for good
        # and rounded; from then on no gradient passes through it, without any error. It has nothing to switch off.
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True
    try:
        with torch.random.fork_rng(devices=cuda_devices()), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(python)
        np.random.set_state(numpy)


def cuda_devices() -> list[int]:
    """The CUDA devices whose random state can have been used: all of them once CUDA is awake."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
