"""What is done to a model while it is measured, and undone: evaluation mode, no gradients, random state as before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
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


@contextmanager
def brought_to(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Each module of `model` is on `device` while it runs, with its inputs, and is back where it was afterwards.

    For a model that waits on the CPU to be sharded, and that the device may not hold whole: at any time it holds the
    parameters and buffers of the modules that are running alone. What the model holds afterwards are the same objects.
    """
    away: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []  # of the modules that run, the innermost last

    def bring(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        away.append((module, dict(module._parameters), dict(module._buffers)))
        for name, own in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(own.to(device), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        return send_to_device(args, device), send_to_device(kwargs, device)

    def back(*_: Any) -> None:
        module, parameters, buffers = away.pop()
        module._parameters.update(parameters)
        module._buffers.update(buffers)

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(bring, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(back).remove)
        try:
            yield
        finally:
            while away:  # of a forward pass that failed
                back()
