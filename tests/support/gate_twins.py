"""Row gates as autograd has them: parameters of the model, stepped by the Trainer's optimizer, clipped by the Trainer.

What they train is compared with what `RowGates` makes of plain LoRA.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from gelora_plugins.methods.base import generator
from tests.support.methods import adapted
from tests.support.training import layers

Gate = Callable[[Tensor], Tensor]


class GatedA(nn.Module):
    """lora_A with a gate behind it."""

    def __init__(self, linear: nn.Linear, gate: Tensor, function: Gate) -> None:
        super().__init__()
        self.weight, self.gate, self.function = linear.weight, nn.Parameter(gate.clone()), function

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) * self.function(self.gate)

    def folded(self) -> Tensor:
        return (self.function(self.gate)[:, None] * self.weight).detach()


def twin(start: Callable[[str, int], Tensor], function: Gate, **options: Any) -> nn.Module:
    """A tiny adapted model with gates that begin at `start(module's name, rank)`."""
    model = adapted(**options)
    for name, layer in layers(model).items():
        linear = layer.lora_A["default"]
        gate = start(name.removeprefix("base_model.model."), linear.out_features)
        layer.lora_A["default"] = GatedA(linear, gate, function)
    return model


def gated(model: nn.Module) -> dict[str, GatedA]:
    return {name.removeprefix("base_model.model."): layer.lora_A["default"] for name, layer in layers(model).items()}


def adamw(model: nn.Module, rate: float, decay: float, gate_lr: float = 1.0) -> torch.optim.AdamW:
    """Weight decay for the matrices, none for the gates, whose rate is `gate_lr` times that of the matrices."""
    gates = [p for name, p in model.named_parameters() if name.endswith(".gate")]
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".gate")]
    groups = [
        {"params": matrices, "weight_decay": decay, "lr": rate},
        {"params": gates, "weight_decay": 0.0, "lr": gate_lr * rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


class L1(TrainerCallback):
    """λ/N Σ|g| as a term of the loss of a step: its gradient, before clipping, in the last backward pass of it."""

    def __init__(self, model: nn.Module, weight: float, accumulation: int) -> None:
        gates = [a.gate for a in gated(model).values()]
        count = sum(len(gate) for gate in gates)
        for gate in gates:
            gate.register_hook(lambda g, gate=gate: g + weight / count / accumulation * gate.detach().sign())


class Proximal(TrainerCallback):
    """Take `amount` from each gate after a step."""

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            for a in gated(model).values():
                for i, g in enumerate(a.gate.tolist()):
                    a.gate[i] = max(g - self.amount, 0.0) if g > 0 else min(g + self.amount, 0.0)


class Beam(TrainerCallback):
    """BeamLoRA's exchange, over all modules, rank by rank."""

    def __init__(self, period: int, share: Callable[[int], float]) -> None:
        self.period, self.share = period, share
        self.pairs: list[tuple[int, int]] = []  # (how many were pruned in a module, its rank)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step, optimizer = state.global_step, kwargs["optimizer"]
        if step > 0 and step % self.period and step % (self.period // 2) == 0:
            self.kept = {}
            for name, layer in layers(model).items():
                for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                    moments = [optimizer.state[matrix][key].clone() for key in ("exp_avg", "exp_avg_sq")]
                    self.kept[name, matrix.shape] = [matrix.detach().clone(), *moments]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step, optimizer = state.global_step, kwargs["optimizer"]
        share = self.share(step - 1)
        if step % self.period or state.max_steps - step < self.period or not share:
            return
        with torch.no_grad():
            p = {name: a.function(a.gate).tolist() for name, a in gated(model).items()}
            ranked = sorted(
                ((value, name, i) for name, values in p.items() for i, value in enumerate(values)), key=first
            )
            total, gone = 0.0, {name: [] for name in p}
            for value, name, i in ranked:
                total += value
                if total > (1 - share) * len(ranked):
                    gone[name].append(i)
            for full, layer in layers(model).items():
                name = full.removeprefix("base_model.model.")
                mine, a, b = p[name], layer.lora_A["default"], layer.lora_B["default"]
                weak = sorted(gone[name], key=mine.__getitem__)[: len(mine) // 2]
                strong = sorted(range(len(mine)), key=lambda i, mine=mine: -mine[i])[: len(weak)]
                order = torch.randperm(len(weak), generator=generator(args.seed, step, name)).tolist()
                self.pairs.append((len(weak), len(mine)))
                for d, place in zip(weak, order, strict=True):
                    s = strong[place]
                    for matrix, rows in ((a.weight, True), (b.weight, False)):
                        held = [matrix, *(optimizer.state[matrix][key] for key in ("exp_avg", "exp_avg_sq"))]
                        for now, then in zip(held, self.kept[full, matrix.shape], strict=True):
                            if rows:
                                now[d] = then[s]
                            else:
                                now[:, d] = then[:, s]
                    a.gate[d] = a.gate[s] = (a.gate[d] + a.gate[s]) / 2
                for key in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[a.gate][key].zero_()


class Alternate(TrainerCallback):
    """DiffoRA-style: A and B in even steps of a search, gates in odd ones; then the given modules begin anew.

    What is not to be trained has no gradient in a step: hooks make it 0, so that the Trainer's clipping does not see
    it, and None after that, so that the optimizer does not.
    """

    def __init__(self, model: nn.Module, search: int, chosen: list[bool]) -> None:
        self.search, self.step = search, 0
        self.modules = list(zip(gated(model).values(), layers(model).values(), chosen, strict=True))
        self.first = [a.weight.detach().clone() for a, _, _ in self.modules]
        for i, (a, layer, _) in enumerate(self.modules):
            a.gate.register_hook(lambda g: g * self.gate_steps())
            for matrix in (a.weight, layer.lora_B["default"].weight):
                matrix.register_hook(lambda g, i=i: g * self.matrices_step(i))

    def gate_steps(self) -> bool:
        return self.step < self.search and self.step % 2 == 1

    def matrices_step(self, i: int) -> bool:
        return self.step % 2 == 0 if self.step < self.search else self.modules[i][2]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for i, (a, layer, _) in enumerate(self.modules):
            if not self.gate_steps():
                a.gate.grad = None
            if not self.matrices_step(i):
                a.weight.grad = layer.lora_B["default"].weight.grad = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.search - 1:
            return
        with torch.no_grad():
            for (a, layer, _), first_a in zip(self.modules, self.first, strict=True):
                a.weight.copy_(first_a)
                layer.lora_B["default"].weight.zero_()
                a.function = torch.ones_like
                for matrix in (a.weight, layer.lora_B["default"].weight):
                    kwargs["optimizer"].state.pop(matrix, None)


def first(entry: tuple[float, str, int]) -> float:
    return -entry[0]


def folded(trainer: Trainer) -> dict[str, Tensor]:
    """What plain LoRA would have: diag(f(g)) A and B of each module."""
    found = {}
    for name, layer in layers(trainer.model).items():
        a = layer.lora_A["default"]
        found[f"{name}.a"] = a.folded() if isinstance(a, GatedA) else a.weight.detach().clone()
        found[f"{name}.b"] = layer.lora_B["default"].weight.detach().clone()
    return found
