"""AdaLoRA (Zhang et al., ICLR 2023, arXiv 2303.10512) on plain LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import expect, generator, orthogonality_gradient
from gelora_plugins.methods.gate_budget import BudgetedGates
from gelora_plugins.ranks.find_adapter import IN_PLACE_INITS

DEVIATION = 0.02  # of the entries of A and B at the start, as published


@dataclass(eq=False)
class AdaLoRA(BudgetedGates):
    """Learn ΔW = s B diag(E) A with nearly orthogonal A and B, and mask the E of the ranks that matter least.

    A and B are drawn from N(0, 0.02²) and E is 0, so that training begins at the base model. A rank scores, with
    I = |p · ∂p| of each of its entries p, its running mean Ī and the running mean Ū of |I - Ī|: ĪŪ of E, plus the
    means of ĪŪ over its row of A and its column of B. What scores least over all modules is masked until the budget is
    reached (`BudgetedGates`); a masked E may return until then. The loss gets
    `orthogonality` / 2n · Σ (||A A' - I||_F + ||B' B - I||_F) over n modules, once for an optimizer step.

    PEFT's AdaLoraModel is the published code. It counts ranks, which is the same where modules cost the same; under a
    Trainer it needs a callback of its own, adds the term in each micro-batch, or, in trainers that make the loss
    themselves, not at all, and ends as another kind of adapter.

    Attributes:
        beta: of both running means.
        orthogonality: the weight of the term; published runs have 0.1 to 0.3, PEFT 0.5.

    Raises:
        ConfigError: a value is out of range.
        MethodError: see `BudgetedGates`; or the initialisation of the adapter would be thrown away.
    """

    name: ClassVar[str] = "adalora"

    beta: float = 0.85
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(0 < self.beta < 1, "beta", self.beta, "a number between 0 and 1")
        expect(self.orthogonality >= 0, "orthogonality", self.orthogonality, "0 or more")
        expect(self.keep is not None or self.budget is not None, "keep", self.keep, "a share, or a budget beside it")

    def check(self) -> None:
        """A and B are drawn here."""
        init = self.adapter.config.init_lora_weights
        if init not in IN_PLACE_INITS:
            raise MethodError(
                f"adalora draws A and B itself, and would throw away what init_lora_weights={init!r} made. Use True."
            )
        super().check()

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """See `BudgetedGates.begin`."""
        super().begin(saved)
        self._means: dict[str, Tensor] = {}
        self._spreads: dict[str, Tensor] = {}
        for name, parameter in self._parameters():
            for kind, held in (("mean", self._means), ("spread", self._spreads)):
                key = f"{kind}.{name}"
                if saved is None:
                    held[name] = torch.zeros_like(parameter, dtype=torch.float32)
                elif key in saved:
                    held[name] = saved[key].to(parameter.device)

    def saved(self) -> dict[str, Tensor]:
        """The running means, as long as they are needed, beside what `BudgetedGates` keeps."""
        means = {f"mean.{name}": mean for name, mean in self._means.items()}
        return super().saved() | means | {f"spread.{name}": spread for name, spread in self._spreads.items()}

    def close(self) -> None:
        """See `RowGates.close`."""
        super().close()
        self._means, self._spreads = {}, {}

    def draw(self) -> Tensor:
        """A and B from N(0, 0.02²), from a seed of each module's own; E = 0."""
        with torch.no_grad():
            for pair, raw in zip(self.pairs, self.raw, strict=True):
                source = generator(self.args.seed, 0, pair.name)
                for matrix in (raw, pair.b):
                    matrix.copy_(DEVIATION * torch.randn(matrix.shape, generator=source))
        return torch.zeros(sum(self.sizes))

    def regularise(self) -> None:
        """Add the gradient of the orthogonality term."""
        if not self.orthogonality:
            return
        weight = self.orthogonality / (2 * len(self.pairs))
        for pair in self.pairs:
            rows, columns = orthogonality_gradient(pair.a), orthogonality_gradient(pair.b.T).T
            for parameter, term in ((pair.a, rows), (pair.b, columns)):
                term = (weight * term).to(parameter.dtype)
                parameter.grad = term if parameter.grad is None else parameter.grad.add_(term)

    def after_step(self, step: int) -> None:
        """Measure what matters, and mask what does least."""
        assert self.shrinking is not None
        if step < self.shrinking.end:
            for name, parameter in self._parameters():
                if parameter.grad is not None:
                    smooth(self._means[name], self._spreads[name], parameter, self.beta)
        self.shrink(step)
        if step == self.shrinking.end:
            self._means, self._spreads = {}, {}

    def scores(self) -> Tensor:
        """Sensitivity times uncertainty of a rank's E, row of A and column of B."""
        products = {name: mean * self._spreads[name] for name, mean in self._means.items()}
        matrices = [
            (products[f"a.{pair.name}"].mean(1) + products[f"b.{pair.name}"].mean(0)).to(self.gates.device)
            for pair in self.pairs
        ]
        return products["gates"] + torch.cat(matrices)

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "gates", self.gates
        for pair in self.pairs:
            yield f"a.{pair.name}", pair.a
            yield f"b.{pair.name}", pair.b


def smooth(mean: Tensor, spread: Tensor, parameter: nn.Parameter, beta: float) -> None:
    """Take |p · ∂p| into its running mean, and its distance from that, which is new, into the other."""
    assert parameter.grad is not None
    sensitivity = (parameter.detach() * parameter.grad).abs().float()
    mean.mul_(beta).add_(sensitivity, alpha=1 - beta)
    spread.mul_(beta).add_((sensitivity - mean).abs(), alpha=1 - beta)
