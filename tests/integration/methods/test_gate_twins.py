"""Methods with row gates train what autograd trains with the gates in the model; AdaLoRA what PEFT's AdaLoRA trains."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, TaskType, get_peft_model
from transformers import TrainerCallback

from gelora_plugins.methods.adalora import AdaLoRA
from gelora_plugins.methods.base import generator
from gelora_plugins.methods.beamlora import BeamLoRA
from gelora_plugins.methods.diffora import DiffoRA
from gelora_plugins.methods.sora import SoRA
from tests.support.gate_twins import L1, Alternate, Beam, Proximal, adamw, folded, twin
from tests.support.methods import adapted, method_trainer
from tests.support.tiny import build

STEPS, RATE, DECAY = 12, 0.005, 0.1
# Every bound, where it bites and where not, and both numbers of micro-batches; not each with each.
CASES = pytest.mark.parametrize(("clip", "accumulation"), [(0.0, 2), (1.0, 1), (0.05, 2)])


class Folded(TrainerCallback):
    """Keeps the matrices of each step; they are pruned after the last."""

    def __init__(self) -> None:
        self.matrices: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.matrices.append(folded(self.trainer))


def trained(
    model: Any, directory: Path, callbacks: list[Any], clip: float, accumulation: int, gate_lr: float = 1.0
) -> list[dict[str, torch.Tensor]]:
    watch = Folded()
    watch.trainer = method_trainer(
        model,
        directory,
        *callbacks,
        watch,
        optimizers=(adamw(model, RATE, DECAY, gate_lr), None),
        max_steps=STEPS,
        learning_rate=RATE,
        max_grad_norm=clip,
        gradient_accumulation_steps=accumulation,
        weight_decay=DECAY,
    )
    watch.trainer.train()
    return watch.matrices


def largest(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> float:
    """The largest difference of an entry after any step."""
    assert len(ours) == len(theirs) == STEPS
    assert ours[0].keys() == theirs[0].keys()
    return max(
        (mine[key] - their[key]).abs().max().item() for mine, their in zip(ours, theirs, strict=True) for key in mine
    )


@CASES
def test_sora_is_what_autograd_makes_of_its_gates(tmp_path: Path, clip: float, accumulation: int) -> None:
    def start(name: str, rank: int) -> torch.Tensor:
        return torch.randn(rank, generator=generator(42, 0, name))

    method = SoRA(shrinkage=0.6, l1=0.1)
    ours = trained(adapted(lora_dropout=0.1), tmp_path, [method], clip, accumulation)
    model = twin(start, lambda gate: gate, lora_dropout=0.1)
    callbacks = [L1(model, 0.1, accumulation), Proximal(0.6 / STEPS)]
    theirs = trained(model, tmp_path, callbacks, clip, accumulation)
    assert largest(ours, theirs) < 5e-6
    rows = torch.cat([matrix.any(1) for key, matrix in ours[-1].items() if key.endswith(".a")])
    assert 0 < rows.sum() < len(rows)  # some gates came to 0


@CASES
def test_beamlora_is_what_autograd_makes_of_its_gates(tmp_path: Path, clip: float, accumulation: int) -> None:
    tau, period, eta = 0.5, 4, 0.6

    def weights(gate: torch.Tensor) -> torch.Tensor:
        return len(gate) * torch.softmax(gate / tau, 0)

    def share(step: int) -> float:
        end = STEPS * 2 / 3
        return eta * (1 + math.cos(math.pi * step / end)) / 2 if step < end else 0.0

    method = BeamLoRA(tau=tau, period=period, eta=eta)
    ours = trained(adapted(lora_dropout=0.1), tmp_path, [method], clip, accumulation)
    beam = Beam(period, share)
    model = twin(lambda name, rank: torch.zeros(rank), weights, lora_dropout=0.1)
    theirs = trained(model, tmp_path, [beam], clip, accumulation)
    assert largest(ours, theirs) < 5e-6
    assert max(pruned for pruned, _ in beam.pairs) == 2


@CASES
def test_diffora_is_what_autograd_makes_of_its_gates(tmp_path: Path, clip: float, accumulation: int) -> None:
    method = DiffoRA(search=6)
    found: list[list[bool]] = []

    class Chosen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if method.chosen:
                found.append(method.chosen)

    ours = trained(adapted(lora_dropout=0.1), tmp_path, [method, Chosen()], clip, accumulation)
    assert [sum(found[0][i : i + 3]) for i in (0, 3, 6)] == [2, 2, 2]  # of three modules in each block
    model = twin(lambda name, rank: torch.zeros(1), torch.sigmoid, lora_dropout=0.1)
    theirs = trained(model, tmp_path, [Alternate(model, 6, found[0])], clip, accumulation, gate_lr=10.0)
    assert largest(ours, theirs) < 5e-6
    still = [not matrix.any() for key, matrix in ours[-1].items() if key.endswith(".b")]
    assert still == [not chosen for chosen in found[0]]


class Allocate(TrainerCallback):
    """What PEFT's AdaLoraModel wants of a training loop."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step)


class Start(TrainerCallback):
    """Keeps what AdaLoRA drew."""

    def __init__(self, method: AdaLoRA) -> None:
        self.method = method

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.drawn = {
                p.name: (raw.clone(), p.b.detach().clone())
                for p, raw in zip(self.method.pairs, self.method.raw, strict=True)
            }


@CASES
def test_adalora_is_that_of_peft(tmp_path: Path, clip: float, accumulation: int) -> None:
    """PEFT adds the term of orthogonality in each micro-batch (0.21), and the scaling there is alpha / (r + 1e-5)."""
    targets, steps = ["q_proj", "o_proj"], 20  # which cost the same
    options = {
        "max_steps": steps,
        "learning_rate": 0.01,
        "max_grad_norm": clip,
        "gradient_accumulation_steps": accumulation,
    }
    method = AdaLoRA(keep=2 / 3, orthogonality=0.1, first=0.1, last=0.2, every=0.05)
    start, watch = Start(method), Folded()
    model = adapted(target_modules=targets, r=6, rank_pattern={}, lora_alpha=12)
    watch.trainer = method_trainer(model, tmp_path, method, start, watch, **options)
    watch.trainer.train()

    config = AdaLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=targets,
        init_r=6,
        target_r=4,
        lora_alpha=12,
        tinit=2,
        tfinal=4,
        deltaT=1,
        total_step=steps,
        orth_reg_weight=0.1 / accumulation,
    )
    theirs = get_peft_model(build("llama"), config)
    modules = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_E")
    }
    for name, (a, b) in start.drawn.items():
        with torch.no_grad():
            modules[name].lora_A["default"].copy_(a)
            modules[name].lora_B["default"].copy_(b)
            modules[name].lora_E["default"].zero_()
    method_trainer(theirs, tmp_path, Allocate(), **options).train()

    ours, changed, ranks = watch.matrices[-1], 0.0, []
    for name, module in modules.items():
        a, e, b = (getattr(module, kind)["default"].detach() for kind in ("lora_A", "lora_E", "lora_B"))
        expected, found = b @ (e * a), ours[f"base_model.model.{name}.b"] @ ours[f"base_model.model.{name}.a"]
        assert (found - expected).abs().max() < 1e-7
        ranks.append(int((e != 0).sum()))
        assert int(ours[f"base_model.model.{name}.a"].any(1).sum()) == ranks[-1]
        changed = max(changed, expected.abs().max().item())
    assert sum(ranks) == 4 * len(ranks)
    assert len(set(ranks)) > 1
    assert changed > 1e-3
