"""LoRA with a gate on each rank: y = W x + s B (f(g) ⊙ A x), in a model that holds diag(f(g)) A between the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gelora_plugins.errors import MethodError
from gelora_plugins.methods.base import Pair, TrainingMethod, expect
from gelora_plugins.ranks.adapter import keep_rows


@dataclass(eq=False)
class RowGates(TrainingMethod):
    """What methods with a gate on each rank share. The model is plain LoRA to all that reads it, at any time.

    A and the gates stand here; the model holds Â = diag(f(g)) A, so that its gradient is all that is needed of the
    backward pass: with u_i = Σ_j dÂ_ij A_ij it is dg = J_f' u, and dA = diag(f(g)) dÂ. The optimizer steps A itself,
    and AdamW without weight decay the gates, at the learning rate of A times `gate_lr`. Gradients are clipped here:
    the Trainer would clip that of Â, which is another thing than clipping those of A and g. The norm that it logs is
    that of Â's, before clipping.

    A subclass gives `draw`, and where it has them `factors`, `pull_back`, `regularise` and `after_step`.

    Attributes:
        gate_lr: learning rate of the gates as a multiple of A's.
        gates: (sum of ranks,) float32, in the order of `pairs`. A subclass with others overrides `spread`, too.
        raw: A of each pair, (r, in_features), in the dtype of its lora_A.
        sizes: r of each pair.

    Raises:
        ConfigError: a value is out of range.
        MethodError: matrices are shared between modules, or the checkpoint is of a training of another length.
    """

    gate_lr: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lent: float | None = None  # args.max_grad_norm while the Trainer is not to clip
        expect(self.gate_lr >= 0, "gate_lr", self.gate_lr, "0 or more")

    # What a subclass writes.

    def draw(self) -> Tensor:
        """The gates to begin with, (sum of ranks,) float32 on the CPU. A subclass may set `raw` and lora_B here."""
        raise NotImplementedError

    def factors(self) -> Tensor:
        """f(g), as `gates`."""
        return self.gates.detach()

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient of the gates, of that of `factors()`."""
        return gradient

    def regularise(self) -> None:
        """Add the gradients of terms of the loss, once for an optimizer step. lora_A holds `raw` here.

        What has no gradient after this, None, is not stepped.
        """

    def after_step(self, step: int) -> None:
        """The method's own rule, after the update of A, B and gates. lora_A holds `raw`, with its gradient.

        Args:
            step: number of steps before this one.
        """

    # The engine.

    def check(self) -> None:
        """Every matrix is one module's, and the optimizer steps it where it can be seen."""
        owners: dict[int, str] = {}
        groups = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        for pair in self.pairs:
            for matrix in (pair.a, pair.b):
                if owners.setdefault(id(matrix), pair.name) != pair.name:
                    raise MethodError(
                        f"{self.name} gives each module gates of its own, and {pair.name} shares a matrix with "
                        f"{owners[id(matrix)]}. Make the adapter without weight tying."
                    )
            if id(pair.a) not in groups or id(pair.b) not in groups:
                raise MethodError(
                    f"{self.name} rewrites gradients before the step, and the optimizer has copies of the matrices of "
                    f"{pair.name}. Use an optimizer that holds them, such as optim='adamw_torch'."
                )
        self._groups = [groups[id(pair.a)] for pair in self.pairs]

    def begin(self, saved: Mapping[str, Tensor] | None) -> None:
        """Take A out of the model, and put the folded matrix in its place."""
        self.sizes = [len(pair.a) for pair in self.pairs]
        self.raw = [pair.a.detach().clone() for pair in self.pairs]
        self._taken = 0
        device = self.pairs[0].a.device
        if saved is None:
            self.gates = nn.Parameter(self.draw().to(device))
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.gates), torch.zeros_like(self.gates)
        else:
            self._taken, steps = saved["steps"].tolist()
            if steps != self.state.max_steps:
                raise MethodError(
                    f"The checkpoint is of a training of {steps} steps, and this one has {self.state.max_steps}: the "
                    f"schedule of {self.name} would be another. Resume with the length that it had."
                )
            for pair, raw in zip(self.pairs, self.raw, strict=True):
                raw.copy_(saved[f"raw.{pair.name}"])
            self.gates = nn.Parameter(saved["gates"].to(device))
            self.exp_avg, self.exp_avg_sq = (saved[key].to(device) for key in ("exp_avg", "exp_avg_sq"))
        self.fold()

    def saved(self) -> dict[str, Tensor]:
        """A, the gates, and the state of their optimizer."""
        raw = {f"raw.{pair.name}": raw for pair, raw in zip(self.pairs, self.raw, strict=True)}
        steps = torch.tensor([self._taken, self.state.max_steps])
        gates = {"gates": self.gates, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "steps": steps}
        return {**raw, **gates}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the Trainer from clipping; before the first micro-batch."""
        if self._running:
            self._lent, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The chain rule, the method's terms of the loss, and clipping."""
        if not self._running:
            return
        clip = self._give_back()
        with torch.no_grad():
            gradients = []
            for pair, raw, factor in zip(self.pairs, self.raw, self.parts(self.factors()), strict=True):
                gradient = pair.a.grad
                if gradient is None:  # the forward pass did not use the module
                    gradients.append(torch.zeros_like(factor))
                else:
                    gradients.append((gradient.float() * raw.float()).sum(1).to(self.gates.device))
                    gradient.mul_(factor[:, None])
                pair.a.copy_(raw)
            self.gates.grad = self.pull_back(torch.cat(gradients))
            self.regularise()
        if clip:
            parameters = [p for p in kwargs["model"].parameters() if p.grad is not None]
            nn.utils.clip_grad_norm_([*parameters, self.gates], clip)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step the gates, and fold them into what the optimizer made of A."""
        if not self._running:
            return
        with torch.no_grad():
            for pair, raw in zip(self.pairs, self.raw, strict=True):
                raw.copy_(pair.a)
            if self.gates.grad is not None:
                self._step_gates(self.gates.grad)
            self.after_step(state.global_step)
            self.fold()
        self.gates.grad = None

    def close(self) -> None:
        """Give back what was borrowed, and let go of the tensors; `begin` may have failed."""
        self._give_back()
        for name in ("gates", "raw", "exp_avg", "exp_avg_sq"):
            self.__dict__.pop(name, None)

    def fold(self) -> None:
        """Put diag(f(g)) A into the model, where A stood."""
        with torch.no_grad():
            for pair, raw, factor in zip(self.pairs, self.raw, self.parts(self.factors()), strict=True):
                pair.a.copy_(raw * factor[:, None])

    def parts(self, vector: Tensor) -> list[Tensor]:
        """`vector`, one value for each rank, as one for each pair, where its lora_A is."""
        split = by_module(vector, self.sizes)
        return [part.to(pair.a.device) for part, pair in zip(split, self.pairs, strict=True)]

    def costs(self) -> list[int]:
        """LoRA parameters of one rank, for each pair."""
        return [cost_of(pair) for pair in self.pairs]

    def prune(self) -> int:
        """Take the ranks out of the adapter that add nothing to its output; one stays, as LoRA has no rank 0.

        Goes by the matrices and not by the gates, as the Trainer may have loaded the best checkpoint. Returns the
        number of LoRA parameters of the ranks that add something.
        """
        rows = {p.name: (p.a.detach().any(1) & p.b.detach().any(0)).nonzero().flatten() for p in self.pairs}
        keep_rows(self.adapter, {name: kept if len(kept) else kept.new_zeros(1) for name, kept in rows.items()})
        return sum(len(rows[pair.name]) * cost_of(pair) for pair in self.pairs)

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's group that holds lora_A, for each pair."""
        return [self.optimizer.param_groups[index] for index in self._groups]

    def spread(self, values: Sequence[float]) -> Tensor:
        """One value for each pair as one for each gate."""
        return torch.tensor(values).repeat_interleave(torch.tensor(self.sizes)).to(self.gates.device)

    def _give_back(self) -> float | None:
        clip = self._lent
        if clip is not None:
            self.args.max_grad_norm, self._lent = clip, None
        return clip

    def _step_gates(self, gradient: Tensor) -> None:
        """AdamW without weight decay, which is linear in the learning rate: each gate has that of its module."""
        beta1, beta2 = self.args.adam_beta1, self.args.adam_beta2
        self._taken += 1
        self.exp_avg.lerp_(gradient, 1 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        roots = self.exp_avg_sq.sqrt() / math.sqrt(1 - beta2**self._taken) + self.args.adam_epsilon
        rates = self.spread([group["lr"] for group in self.groups()])
        self.gates.sub_(self.gate_lr * rates / (1 - beta1**self._taken) * self.exp_avg / roots)


def by_module(vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Views of `vector`, one for each module."""
    return list(torch.split(vector, list(sizes)))


def cost_of(pair: Pair) -> int:
    """LoRA parameters of one rank."""
    return pair.a.shape[1] + pair.b.shape[0]
