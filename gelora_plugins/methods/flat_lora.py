"""Flat-LoRA (Li et al., ICML 2025, arXiv 2409.14396): LoRA trained under noise on the merged weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import Pair, TrainingMethod, expect, generator

MODES = ("hook", "swap")


@dataclass(eq=False)
class FlatLoRA(TrainingMethod):
    """Minimise the expected loss at W' + noise, so that the merged weights W' = W + s B A end in a flat minimum.

    The noise of row i is N(0, f(t)² sigma² / n · ||W'_i||²) with n input features, so that it adds sigma² of the
    output's variance whatever n. It is drawn once for an optimizer step, is the same for all its micro-batches and
    in every process, and grows with f(t) = (1 - cos(pi t / T)) / 2: step 0 is LoRA. Gradients reach A and B only; the
    base weights are never written to in mode "hook", and are put back bit for bit in mode "swap".

    The published code differs: it seeds torch's global generator from the clock, adds and subtracts the noise in the
    weights' own dtype (which leaves a residue), and draws another noise in each process.

    Attributes:
        sigma: strength; the paper's are 0.05 for language models, 0.15 for CLIP, 0.1 for diffusion.
        mode: "hook" adds the noise's part to each output, at the cost of one more product forward and backward and
            of drawing the noise in each; it works on quantised weights. "swap" puts noisy weights in the place of the
            base's for a step, at the cost of a copy of them.

    Raises:
        ConfigError: a value is out of range.
    """

    name: ClassVar[str] = "flat_lora"
    goes_with_others: ClassVar[bool] = True

    sigma: float = 0.05
    mode: str = "hook"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(math.isfinite(self.sigma) and self.sigma >= 0, "sigma", self.sigma, "0 or more")
        expect(self.mode in MODES, "mode", self.mode, f"one of: {', '.join(MODES)}")

    def check(self) -> None:
        """The noise follows a weight; mode "swap" exchanges it, in floating point."""
        for pair in self.pairs:
            weight = getattr(_base(pair), "weight", None)
            if weight is None:
                raise MethodError(
                    f"flat_lora needs the weight of each adapted map; {type(_base(pair)).__name__} of {pair.name} has "
                    "none. Leave it out of target_modules."
                )
            if self.mode == "swap" and not weight.is_floating_point():
                raise MethodError(
                    f"mode='swap' needs weights in floating point; {pair.name} has {weight.dtype}. Use mode='hook'."
                )

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """Measure the rows of the base weights, which do not change, once."""
        self._noise: dict[str, tuple[Tensor, int]] = {}  # of this step: (standard deviation of each row, seed)
        self._kept: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._squares = {pair.name: _rows(pair).square().sum(1) for pair in self.pairs}
        if self.mode == "hook":
            for pair in self.pairs:
                self._hooks.append(_base(pair).register_forward_hook(self._hook(pair)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the noise of this step; before the first micro-batch."""
        if not self._running or not self.strength(state.global_step, state.max_steps):
            return
        for pair in self.pairs:
            deviations = self.strength(state.global_step, state.max_steps) * self._deviations(pair)
            seed = generator(args.seed, state.global_step, pair.name).initial_seed()
            if self.mode == "hook":
                self._noise[pair.name] = (deviations, seed)
            else:
                base = _base(pair)
                self._kept[pair.name] = base.weight.data
                base.weight.data = base.weight.data + _oriented(base, _draw(deviations, seed, pair.a.shape[1])).to(
                    base.weight.dtype
                )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are there: what comes now, up to the next step, is without noise."""
        self._quiet()

    def close(self) -> None:
        """Leave the model without hooks, and with its own weights."""
        self._quiet()
        for hook in self._hooks:
            hook.remove()
        del self._squares, self._hooks

    def strength(self, step: int, steps: int) -> float:
        """f(t) sigma of the paper; 0 at step 0, sigma at the end."""
        return self.sigma * (1 - math.cos(math.pi * step / steps)) / 2

    def _quiet(self) -> None:
        if self._running or self._kept:
            self._noise.clear()
            for pair in reversed(self.pairs):  # of a weight that two modules share the first copy is the clean one
                if pair.name in self._kept:
                    _base(pair).weight.data = self._kept.pop(pair.name)

    def _deviations(self, pair: Pair) -> Tensor:
        """||W'_i|| / sqrt(n), (out_features,) float32, without W': that may be quantised, and is never made.

        ||W'_i||² = ||W_i||² + 2 s B_i · (A W')_i + s² B_i A A' B_i', and A W' is what the base layer makes of A.
        """
        base = _base(pair)
        with torch.no_grad():
            a, b = pair.a.float(), pair.b.float()
            if base.weight.is_floating_point():
                products = a @ _rows(pair).T
            else:
                products = base(a) - (0 if base.bias is None else base.bias)  # there is no noise now
            cross = (b * products.float().T).sum(1)
            squares = self._squares[pair.name] + 2 * pair.scaling * cross
            squares += pair.scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
            return squares.clamp(min=0).div(pair.a.shape[1]).sqrt()

    def _hook(self, pair: Pair) -> Any:
        def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            found = self._noise.get(pair.name)
            if found is None or not module.training or pair.layer.disable_adapters:  # then it is a reference
                return output
            made: Tensor = _NoisyProduct.apply(inputs[0], *found)  # type: ignore[no-untyped-call]
            return output + made.to(output.dtype)

        return add_noise


class _NoisyProduct(torch.autograd.Function):
    """x E' for noise E (out, in) that is drawn anew in the backward pass: only its deviations and seed are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, deviations: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(deviations)
        ctx.seed, ctx.features = seed, x.shape[-1]
        return x @ _draw(deviations, seed, x.shape[-1]).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (deviations,) = ctx.saved_tensors
        return gradient @ _draw(deviations, ctx.seed, ctx.features).to(gradient.dtype), None, None


def _draw(deviations: Tensor, seed: int, features: int) -> Tensor:
    """(out, features) float32 noise of these deviations by row."""
    source = torch.Generator(deviations.device).manual_seed(seed)
    normal = torch.randn(len(deviations), features, generator=source, device=deviations.device)
    return normal * deviations[:, None]


def _base(pair: Pair) -> Any:
    return pair.layer.get_base_layer()


def _rows(pair: Pair) -> Tensor:
    """The base weight, (out, in) float32; of a quantised one the dequantised."""
    base = _base(pair)
    weight = base.weight if base.weight.is_floating_point() else dequantize_module_weight(base)
    return _oriented(base, weight.detach().float())


def _oriented(base: Any, matrix: Tensor) -> Tensor:
    """transformers' Conv1D keeps its weight as (in, out); the way there is the way back."""
    return matrix.T if type(base).__name__ == "Conv1D" else matrix
