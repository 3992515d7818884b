"""LoRA-Pro (Wang et al., ICLR 2025, arXiv 2407.18242): steps of A and B that come nearest to full fine-tuning's."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import Pair, TrainingMethod, expect

logger = logging.getLogger(__name__)

MODES = ("full", "efficient")
MOMENTS = ("lora_pro_mean", "lora_pro_square")  # not Adam's names: their shape is that of the weights
CUTOFF = 1e-6  # of the largest eigenvalue; those below count as 0


@dataclass(eq=False)
class LoRAPro(TrainingMethod):
    """Rewrite the gradients of A and B so that what they change in W = s B A comes nearest to the full gradient g.

    Small steps along g_A and g_B change W along g~ = s B g_A + s g_B A. Nearest to g, in the Frobenius norm, is
    g~ = P_B g + (1 - P_B) g P_A, with the projectors on the columns of B and the rows of A; it needs A.grad and B.grad
    only. Among the g_A and g_B that give it, it takes those nearest to the gradients themselves.

    Mode "full" is that of the official code: AdamW's moments are kept for g~, in the shape of the weights, and the step
    that they give is brought back to A and B in the same way. Learning rate, betas, eps and weight decay are those of
    the optimizer's groups. Mode "efficient" gives the rewritten gradients to the optimizer; that this is the mode which
    the paper calls so is from secondary sources. In it g_A is huge when B first leaves 0, and Adam's moments remember
    that for some thousand steps.

    The paper's full text was not available; the closed form was checked against least squares. What the official code
    does otherwise: its scaling is fixed at 16/8, with rsLoRA, too; its first step is shorter than Adam's by a mistake;
    its clipping is of the raw gradients, applied to the finished step; it pairs A and B by their order in a partition,
    which may part them; and it adds 1e-8 to the matrices that it inverts, where here eigenvalues below 1e-6 of the
    largest count as 0. Here gradients are clipped before they are rewritten, which is linear in them.

    Attributes:
        mode: "full" needs 8 bytes for each weight that is adapted, and says how many; "efficient" none.

    Raises:
        ConfigError: a value is out of range.
        MethodError: at the start of training, for mode "full" without the settings of AdamW, with an adapter less
            precise than float32, or when it resumes without the moments.
    """

    name: ClassVar[str] = "lora_pro"

    mode: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.mode in MODES, "mode", self.mode, f"one of: {', '.join(MODES)}")

    def check(self) -> None:
        """Mode "full" is an AdamW. Its moments are in optimizer.pt, in the adapter's dtype (torch 2.13)."""
        self._groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        if self.mode != "full":
            return
        for pair in self.pairs:
            group = self._groups[id(pair.a)]
            if "betas" not in group or not isinstance(group.get("eps"), float):
                kind = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__
                raise MethodError(
                    f"lora_pro mode=full takes AdamW's betas and eps from the optimizer, and {kind} has not both. Use "
                    "optim='adamw_torch', or mode=efficient."
                )
            if pair.a.dtype not in (torch.float32, torch.float64):
                raise MethodError(
                    f"lora_pro mode=full keeps moments as precise as float32, and lora_A of {pair.name} is "
                    f"{pair.a.dtype}. Make the adapter in float32, as PEFT does by itself, or use mode=efficient."
                )
            resumes = self._resumed is not None and self.state.global_step > 0
            if resumes and MOMENTS[0] not in self.optimizer.state.get(pair.a, {}):
                raise MethodError(
                    f"The checkpoint {self._resumed} has no moments of lora_pro for {pair.name}: its optimizer.pt is "
                    "missing, or of another training. Resume from another checkpoint, or start anew."
                )

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """Say what memory is needed before it is taken."""
        if self.mode == "full":
            sizes = [len(pair.b) * pair.a.shape[1] for pair in self.pairs]
            needed = 2 * sum(n * pair.a.element_size() for n, pair in zip(sizes, self.pairs, strict=True)) / 1e9
            logger.warning(
                "lora_pro mode=full keeps two moments of each of the %d adapted weights: %.2g GB.", sum(sizes), needed
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients are there, and clipped: rewrite them, or step."""
        if not self._running:
            return
        with torch.no_grad():
            pairs = [pair for pair in self.pairs if pair.a.grad is not None and pair.b.grad is not None]
            for pair, point in zip(pairs, points((p.a, p.b, p.scaling) for p in pairs), strict=True):
                if self.mode == "full":
                    self._step(pair, point)
                else:
                    gradients: tuple[Any, Any] = (pair.a.grad, pair.b.grad)
                    for gradient, rewritten in zip(gradients, point.nearest(*gradients), strict=True):
                        gradient.copy_(rewritten)

    def close(self) -> None:
        """Nothing was borrowed. The moments stay with the optimizer, whose they are."""
        del self._groups

    def _step(self, pair: Pair, point: Point) -> None:
        """AdamW's step of the weights, brought back to A and B; the optimizer does nothing with these."""
        a, b, s, dtype = pair.a, pair.b, pair.scaling, pair.a.dtype
        first, second = (factor.to(dtype) for factor in point.equivalent(a.grad, b.grad))
        step = self._adam(pair, s * (b @ first + second @ a))
        for matrix, along in zip((a, b), point.nearest(s * b.T @ step, s * step @ a.T), strict=True):
            group = self._groups[id(matrix)]
            matrix.mul_(1 - group["lr"] * group.get("weight_decay", 0))
            matrix.sub_(group["lr"] * along.to(dtype))
            matrix.grad = None

    def _adam(self, pair: Pair, gradient: Tensor) -> Tensor:
        """m / (sqrt(v) + eps) of `gradient`, m and v corrected for their start at 0, (out_features, in_features)."""
        group, state = self._groups[id(pair.a)], self.optimizer.state[pair.a]
        if not state:
            state["step"] = torch.tensor(0.0)  # torch's Adam looks for it in every state that it loads (2.13)
            for name in MOMENTS:
                state[name] = torch.zeros_like(gradient)
        first, second = group["betas"]
        mean, square = (state[name] for name in MOMENTS)
        state["step"] += 1
        count = state["step"].item()
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        step: Tensor = mean.div(1 - first**count)
        return step.div_(square.div(1 - second**count).sqrt_().add_(group["eps"]))


class Point(NamedTuple):
    """A pair where it stands, in float64, in which what is 0 but for rounding is told from what is small.

    Attributes:
        a, b: (r, n) and (m, r).
        scaling: s.
        values_a, vectors_a: the spectrum of A A'.
        values_b, vectors_b: of B' B.
    """

    a: Tensor
    b: Tensor
    scaling: float
    values_a: Tensor
    vectors_a: Tensor
    values_b: Tensor
    vectors_b: Tensor

    def equivalent(self, g_a: Any, g_b: Any) -> tuple[Tensor, Tensor]:
        """(F, S) with g~ = s B F + s S A: F = (B' B)+ G_A / s², S = (1 - B (B' B)+ B') G_B (A A')+ / s².

        Args:
            g_a: G_A = s B' g, the gradient of A, (r, n).
            g_b: G_B = s g A', the gradient of B, (m, r).
        """
        g_a, g_b = precise(g_a), precise(g_b)
        inverse_a, inverse_b = _inverse(self.values_a, self.vectors_a), _inverse(self.values_b, self.vectors_b)
        outside = g_b - self.b @ (inverse_b @ (self.b.T @ g_b))  # without the projector, which is (m, m)
        return inverse_b @ g_a / self.scaling**2, outside @ inverse_a / self.scaling**2

    def nearest(self, g_a: Any, g_b: Any) -> tuple[Tensor, Tensor]:
        """(F + X A, S - B X), which give the same g~, with the X that brings them nearest to `g_a` and `g_b`.

        That is the solution of B' B X + X A A' = -(B' B)+ G_A A' / s².
        """
        first, second = self.equivalent(g_a, g_b)
        right = -self.vectors_b.T @ (first @ self.a.T) @ self.vectors_a
        kept = _counts(self.values_b)[:, None] & _counts(self.values_a)  # elsewhere the right side is 0
        x = self.vectors_b @ torch.where(kept, right / (self.values_b[:, None] + self.values_a), 0) @ self.vectors_a.T
        return first + x @ self.a, second - self.b @ x


def points(matrices: Iterable[tuple[Tensor, Tensor, float]]) -> list[Point]:
    """A Point for each (A, B, s). Spectra of one size are found together: each alone is mostly waiting on a GPU."""
    made = [(precise(a), precise(b), s) for a, b, s in matrices]
    alike: dict[Any, list[int]] = {}
    for i, (a, _, _) in enumerate(made):
        alike.setdefault((len(a), a.device), []).append(i)
    found: dict[int, Point] = {}
    for members in alike.values():
        values, vectors = torch.linalg.eigh(
            torch.stack([made[i][0] @ made[i][0].T for i in members] + [made[i][1].T @ made[i][1] for i in members])
        )
        for k, i in enumerate(members):
            other = k + len(members)
            found[i] = Point(*made[i], values[k], vectors[k], values[other], vectors[other])
    return [found[i] for i in range(len(made))]


def precise(matrix: Tensor) -> Tensor:
    """In float64, or on a device without it in float32."""
    return matrix.detach().to(torch.float32 if matrix.device.type == "mps" else torch.float64)


def _counts(values: Tensor) -> Tensor:
    return values > CUTOFF * values.max()


def _inverse(values: Tensor, vectors: Tensor) -> Tensor:
    """Pseudo-inverse of a positive semi-definite matrix, (r, r), of its eigenvalues and -vectors."""
    inverse = torch.where(_counts(values), 1 / values, 0)
    return (vectors * inverse) @ vectors.T
