"""Hidden states at every block boundary, pooled inside the forward hooks: PooledFeatures. Leaves no trace."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gelora_plugins.errors import LayoutError, ProbeError
from gelora_plugins.layout import HOW_TO_REGISTER, ModelLayout, unwrap
from gelora_plugins.probe_set import IGNORED_LABEL, Batch

Pooling = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PooledFeatures:
    """One point per document at every block boundary.

    Attributes:
        points: one tensor (documents, features) per boundary, float32 on the CPU; the rows of all are the same
            documents. `points[0]` enters the first block.
        num_tokens: real tokens that went through the backbone.
    """

    points: tuple[Tensor, ...]
    num_tokens: int


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


def collect_features(
    model: nn.Module, layout: ModelLayout, batches: Iterable[Batch], pooling: Pooling
) -> PooledFeatures:
    """Run `batches` through the backbone of `model` and pool what enters and leaves every block.

    Args:
        model: a model, or a PEFT model whose adapter does nothing yet.
        batches: inputs of the backbone; those it does not take (labels, say) are left out.
        pooling: (hidden (documents, tokens, features), mask (documents, tokens)) -> (documents, features).

    Raises:
        ProbeError: a hidden state is not finite, or has another shape than (documents, tokens, features); or the
            backbone takes none of the inputs.
        LayoutError: a block was not called, or more than once, in a forward pass.
    """
    root = unwrap(model)
    backbone = root.get_submodule(layout.backbone)
    accepted = inspect.signature(backbone.forward).parameters
    device = next(backbone.parameters()).device
    recorder = _Recorder(layout, pooling)
    with ExitStack() as stack:
        stack.enter_context(leaving_no_trace(model))
        for handle in recorder.attach(root):
            stack.callback(handle.remove)
        for batch in batches:
            inputs = {name: value.to(device) for name, value in with_decoder_inputs(root, batch).items()}
            recorder.masks = _masks(inputs, layout)
            arguments: dict[str, Any] = {name: value for name, value in inputs.items() if name in accepted}
            arguments.pop("labels", None)  # a model that is its own backbone, T5 with its head, would make a loss
            if not arguments:
                raise ProbeError(
                    f"A batch has {', '.join(inputs) or 'no tensors'}; expected inputs that {type(backbone).__name__} "
                    f"takes, such as {', '.join(list(accepted)[:3])}."
                )
            if "use_cache" in accepted:
                arguments["use_cache"] = False
            backbone(**arguments)
            recorder.end_batch()
    return PooledFeatures(recorder.result(), recorder.num_tokens)


def with_decoder_inputs(model: nn.Module, batch: Batch) -> Batch:
    """`batch` with the decoder's inputs, which an encoder-decoder model of transformers makes from the labels."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch
    if "labels" in batch and "decoder_attention_mask" not in batch:  # collators make none
        batch = {**batch, "decoder_attention_mask": batch["labels"] != IGNORED_LABEL}
    if "decoder_input_ids" in batch:
        return batch
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or "labels" not in batch:
        raise ProbeError(
            f"{type(model).__name__} needs decoder inputs; expected `decoder_input_ids` in the batch, or `labels` "
            "and a model that can shift them (one with a language-model head)."
        )
    # Models fill ignored labels with the padding token themselves.
    return {**batch, "decoder_input_ids": shift(labels=batch["labels"])}


def _masks(inputs: Batch, layout: ModelLayout) -> list[Tensor | None]:
    """For each stack which tokens are real: (documents, tokens) bool. None, as for images, means that all are."""
    masks: list[Tensor | None] = []
    for prefix, _ in zip(("", "decoder_"), layout.stacks, strict=False):
        mask = inputs.get(f"{prefix}attention_mask")
        if mask is None or mask.dim() != 2:
            ids = inputs.get(f"{prefix}input_ids")
            mask = None if ids is None else torch.ones_like(ids)
        if mask is not None and not mask.bool().any(dim=1).all():
            raise ProbeError("A document of the training data has no tokens; leave empty rows out.")
        masks.append(None if mask is None else mask.bool())
    return masks


class _Recorder:
    """Pools hidden states in forward hooks, so that no full hidden state outlives its block."""

    def __init__(self, layout: ModelLayout, pooling: Pooling) -> None:
        self.layout = layout
        self.pooling = pooling
        self.masks: list[Tensor | None] = []
        self.num_tokens = 0
        self.batch: dict[int, Tensor] = {}
        self.points: list[list[Tensor]] = [[] for _ in range(layout.num_boundaries)]

    def attach(self, root: nn.Module) -> Iterator[Any]:
        boundary = 0
        for index, stack in enumerate(self.layout.stacks):
            first = root.get_submodule(stack[0].name)
            yield first.register_forward_pre_hook(self._before(boundary, index), with_kwargs=True)
            for block in stack:
                boundary += 1
                yield root.get_submodule(block.name).register_forward_hook(self._after(boundary, index))
            boundary += 1

    def _before(self, boundary: int, stack: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._record(boundary, stack, args[0] if args else kwargs.get("hidden_states"))

        return hook

    def _after(self, boundary: int, stack: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._record(boundary, stack, output[0] if isinstance(output, tuple) else output)

        return hook

    def _record(self, boundary: int, stack: int, hidden: Any) -> None:
        mask = self.masks[stack]
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else ()
        if mask is None and len(shape) == 3:
            mask = self.masks[stack] = torch.ones(shape[:2], dtype=torch.bool)
        if mask is None or len(shape) != 3 or shape[:2] != mask.shape:
            expected = f" with documents and tokens {tuple(mask.shape)}" if mask is not None else ""
            raise ProbeError(
                f"The hidden state at boundary {boundary} is {shape or type(hidden).__name__}; expected (documents, "
                f"tokens, features){expected}."
            )
        if boundary in self.batch:
            raise LayoutError(
                f"Boundary {boundary} was passed twice in one forward pass: blocks that are shared between layers "
                f"have no rank of their own. {HOW_TO_REGISTER}"
            )
        points = self.pooling(hidden, mask.to(hidden.device)).float()
        if points.dim() != 2 or len(points) != len(mask):
            raise ProbeError(
                f"The pooling made points of shape {tuple(points.shape)} of {len(mask)} documents; expected "
                "(documents, features)."
            )
        bad = int((~points.isfinite()).any(dim=1).sum())
        if bad:
            raise ProbeError(
                f"The hidden state at boundary {boundary} is not finite for {bad} of {len(points)} documents. "
                "The model overflows in this dtype, or its weights are damaged; load it in bfloat16 or float32."
            )
        self.batch[boundary] = points.cpu()

    def end_batch(self) -> None:
        if len(self.batch) != len(self.points):
            missing = sorted(set(range(len(self.points))) - set(self.batch))
            raise LayoutError(
                f"Boundaries {missing} were not passed in the forward pass of the backbone. {HOW_TO_REGISTER}"
            )
        for boundary, points in self.batch.items():
            self.points[boundary].append(points)
        self.batch = {}
        self.num_tokens += sum(int(mask.sum()) for mask in self.masks if mask is not None)

    def result(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(points) for points in self.points)
