"""Each method that changes the steps against a plain loop that does what its paper says, on the same batches.

All in float64, but for the loss, which transformers 5.23 computes in float32 from the logits: where these differ by
rounding (1e-15) it may come out another float32 and gradients differ by 1e-7 of themselves. What a method does is seen
in the second digit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback

from gelora_plugins.methods.base import generator
from gelora_plugins.methods.cola import COLA
from gelora_plugins.methods.flat_lora import FlatLoRA
from gelora_plugins.methods.lora_pro import LoRAPro
from gelora_plugins.methods.rm_lora import RMLoRA
from gelora_plugins.methods.xgblora import XGBLoRA, draw
from tests.support.steps import (
    STEPS,
    Batches,
    adapted,
    assert_equal,
    assert_near,
    gradients,
    pairs,
    products,
    train,
    weights,
)
from tests.support.tiny import build
from tests.support.training import LORA, losses, matrices

RATE, DECAY = 0.05, 0.1
UNIFORM = {"rank_pattern": {}, "alpha_pattern": {}}
NEAR = 1e-5
Step = Callable[[int], None]


def linear(step: int, steps: int) -> float:
    return RATE * (steps - step) / steps


def adamw(model: nn.Module, decay: float = DECAY) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATE, weight_decay=decay)


def trained(tmp_path: Path, method: Any, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """(the model, its batches) of a training by `method`, with clipping that acts and weight decay."""
    batches = Batches()
    model = adapted(torch.float64, **options)
    trainer = train(model, tmp_path, method, batches, max_grad_norm=0.5, weight_decay=DECAY)
    assert len(batches.seen) == STEPS
    assert max(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry) > 0.5
    return trainer.model, batches.seen


def loop(model: nn.Module, batches: list[dict[str, Any]], before: Step, after: Step, optimizer: Any) -> None:
    """A training with `before` each optimizer step, at whose end gradients are there and clipped, and `after` it."""
    for step, batch in enumerate(batches):
        gradients(model, batch, 0.5)
        before(step)
        for group in optimizer.param_groups:
            group["lr"] = linear(step, STEPS)
        optimizer.step()
        after(step)


def nothing(step: int) -> None:
    pass


# Chains: train an adapter of the slot's rank, merge it, draw another, with another optimizer.


def chain(batches: list[dict[str, Any]], links: list[Any]) -> dict[str, Tensor]:
    """The weights in the end; each link has its first step, its end, its adapter's options, its A and its rates."""
    base = build("llama").double()
    for start, end, options, rows, rate in links:
        model = get_peft_model(base, LoraConfig(**{**LORA, **options})).double()
        for name, a, _, _, _ in pairs(model):
            a.data.copy_(rows[name])
        optimizer = adamw(model)
        for step in range(start, end):
            gradients(model, batches[step], 0.5)
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.step()
        base = model.merge_and_unload()
    return {name: module.weight.detach() for name, module in base.named_modules() if isinstance(module, nn.Linear)}


def check_chain(model: Any, expected: dict[str, Tensor]) -> None:
    found, base = weights(model), build("llama").double()
    moved = {name: value - base.get_submodule(name).weight for name, value in found.items()}
    assert_near(moved, {name: expected[name] - base.get_submodule(name).weight for name in found}, NEAR)


def test_cola_is_merging_and_drawing_anew(tmp_path: Path) -> None:
    options = {**UNIFORM, "r": 6, "lora_alpha": 12}
    first = {name: a.detach().clone() for name, a, *_ in pairs(adapted(torch.float64, **options))}
    model, batches = trained(tmp_path, COLA(), **options)
    links = []
    for k in range(3):
        rows = {name: a[2 * k : 2 * k + 2] for name, a in first.items()}
        links.append((2 * k, 2 * k + 2, {"r": 2, "lora_alpha": 4}, rows, lambda step: linear(step % 2, 2)))
    check_chain(model, chain(batches, links))
    assert {torch.linalg.matrix_rank(product).item() for product in products(model).values()} == {6}


def test_xgblora_is_merging_and_drawing_anew(tmp_path: Path) -> None:
    first = {name: a.detach().clone() for name, a, *_ in pairs(adapted(torch.float64))}
    model, batches = trained(tmp_path, XGBLoRA(blocks=2))
    links, done = [], [0, 0, 0]
    for step, chosen in enumerate(draw([5, 3, 4], 2, 42)):
        rows = {
            name: a[done[block]][None]
            for name, a in first.items()
            if (block := int(name.split(".layers.")[1][0])) in chosen
        }
        for block in chosen:
            done[block] += 1
        blocks = "|".join(map(str, sorted(chosen)))
        booster = {"r": 1, "lora_alpha": 2, "target_modules": rf".*\.layers\.({blocks})\..*_proj"}
        links.append((step, step + 1, booster, rows, lambda step: linear(step, STEPS)))
    assert done == [5, 3, 4]
    check_chain(model, chain(batches, links))


def test_boosters_of_all_blocks_are_knots_of_rank_one(tmp_path: Path) -> None:
    options = {**UNIFORM, "r": 3}
    knots = train(adapted(**options), tmp_path, COLA(knots=3, restart=False))
    boosters = train(adapted(**options), tmp_path, XGBLoRA(blocks=3))
    assert losses(boosters) == losses(knots)
    assert_equal(matrices(boosters.model), matrices(knots.model))


class Frozen(TrainerCallback):
    """Looks at the matrices before and after each step: `moved` has, step by step, the ranks that moved by module."""

    def __init__(self) -> None:
        self.moved: list[dict[str, list[int]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: (a.detach().clone(), b.detach().clone()) for name, a, b, *_ in pairs(model)}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = {}
        for name, a, b, *_ in pairs(model):
            old_a, old_b = self.before[name]
            ranks = (a != old_a).any(dim=1) | (b != old_b).any(dim=0)
            step[name] = ranks.nonzero().flatten().tolist()
        self.moved.append(step)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_frozen_slots_do_not_move(tmp_path: Path, optimizer: str) -> None:
    watch = Frozen()
    train(adapted(), tmp_path, COLA(), watch, weight_decay=0.5, optim=optimizer)
    edges = {5: (0, 2, 3, 5), 3: (0, 1, 2, 3), 4: (0, 1, 3, 4)}
    ranks = {name: len(a) for name, a, *_ in pairs(adapted())}
    for step, moved in enumerate(watch.moved):
        for name, found in moved.items():
            first, end = edges[ranks[name]][step // 2 : step // 2 + 2]
            assert found == list(range(first, end))


def test_all_ranks_move_in_lora(tmp_path: Path) -> None:
    """What `Frozen` sees where nothing is frozen."""
    watch = Frozen()
    train(adapted(), tmp_path, watch)
    assert {tuple(ranks) for step in watch.moved for ranks in step.values()} == {
        tuple(range(5)),
        tuple(range(3)),
        tuple(range(4)),
    }


# RM-LoRA


@pytest.mark.parametrize("mask", ["grad", "update"])
@pytest.mark.parametrize("same", [True, False])
def test_rm_lora_is_the_loop(tmp_path: Path, mask: str, same: bool) -> None:
    model, batches = trained(tmp_path, RMLoRA(orthogonality=0.1, mask=mask, same=same))
    twin = adapted(torch.float64)
    matrix = [(name, p) for name, p in twin.named_parameters() if "lora_" in name]
    masked: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}

    def before(step: int) -> None:
        norms = []
        for name, p in matrix:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            norms.append((gram - torch.eye(len(gram))).norm())
        penalty = 0.1 * torch.stack(norms).mean()
        for (_, p), gradient in zip(matrix, torch.autograd.grad(penalty, [p for _, p in matrix]), strict=True):
            p.grad += gradient
        masked.clear()
        for name, p in matrix if step else ():
            rank = min(p.shape)
            source = generator(42, step, name.removeprefix("base_model.model.").split(".lora_")[0])
            drawn = torch.randperm(rank, generator=source)
            if "lora_B" in name and not same:
                drawn = torch.randperm(rank, generator=source)
            out = torch.zeros(rank, dtype=torch.bool)
            out[drawn[max(1, round(rank / 2)) :]] = True
            masked[name] = (out[:, None] if "lora_A" in name else out).expand_as(p)
            p.grad[masked[name]] = 0
            kept[name] = p.detach().clone()

    def after(step: int) -> None:
        for name, p in matrix:
            if mask == "update" and step:
                p.data = torch.where(masked[name], kept[name], p.data)

    loop(twin, batches, before, after, adamw(twin))
    assert_near(matrices(model), matrices(twin), NEAR)


def test_a_step_of_gradient_descent_moves_the_drawn_ranks_only(tmp_path: Path) -> None:
    watch, method = Frozen(), RMLoRA()
    train(adapted(), tmp_path, method, watch, optim="sgd")
    for step, moved in enumerate(watch.moved):
        for name, found in moved.items():
            rank = {"0": 5, "1": 3, "2": 4}[name.split(".layers.")[1][0]]
            masked, _ = method.draw(name, rank, 42, step)
            expected = set(range(rank)) - set(masked.tolist()) if step else set(range(rank))
            assert set(found) == expected


# LoRA-Pro, with the gradient of the weights, which the method never sees


def full_gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Of the adapted weights, scaled as clipping scales those of the adapter, which are left in `grad`."""
    bases = {name: base.weight for name, _, _, _, base in pairs(model)}
    model.zero_grad()
    for weight in bases.values():
        weight.requires_grad_(True)
    model(**batch).loss.backward()
    found = {name: weight.grad for name, weight in bases.items()}
    for weight in bases.values():
        weight.requires_grad_(False)
        weight.grad = None
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
    return {name: gradient * min(1.0, 0.5 / (norm.item() + 1e-6)) for name, gradient in found.items()}


def without_small(matrix: Tensor) -> Tensor:
    """Without singular values below 1e-3 of the largest: their squares are the method's limit for eigenvalues."""
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ torch.diag(values * (values > 1e-3 * values.max())) @ v


def nearest(a: Tensor, b: Tensor, s: float, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of all (g_A, g_B) whose s B g_A + s g_B A is nearest to `target`, the ones nearest to (s B' g, s g A').

    After Adam's first step, whose entries are of one size, some B have a singular value of 4e-7 of the largest.
    """
    a, b = without_small(a), without_small(b)
    eyes = torch.eye(len(b), dtype=b.dtype), torch.eye(a.shape[1], dtype=a.dtype)
    system = s * torch.cat([torch.kron(b, eyes[1]), torch.kron(eyes[0], a.T.contiguous())], dim=1)
    own = torch.cat([(s * b.T @ target).flatten(), (s * target @ a.T).flatten()])
    found = own + torch.linalg.pinv(system, rtol=1e-10) @ (target.flatten() - system @ own)
    return found[: a.numel()].view_as(a), found[a.numel() :].view_as(b)


@pytest.mark.parametrize("mode", ["full", "efficient"])
def test_lora_pro_is_least_squares_on_the_full_gradient(tmp_path: Path, mode: str) -> None:
    model, batches = trained(tmp_path, LoRAPro(mode=mode))
    twin = adapted(torch.float64)
    moments = {name: [torch.zeros_like(base.weight) for _ in range(2)] for name, _, _, _, base in pairs(twin)}
    optimizer = adamw(twin)
    for step, batch in enumerate(batches):
        full = full_gradients(twin, batch)
        rate = optimizer.param_groups[0]["lr"] = linear(step, STEPS)
        with torch.no_grad():
            for name, a, b, s, _ in pairs(twin):
                g_a, g_b = nearest(a, b, s, full[name])
                if mode == "efficient":
                    a.grad, b.grad = g_a, g_b
                    continue
                equivalent = s * (b @ g_a + g_b @ a)
                mean, square = moments[name]
                mean.mul_(0.9).add_(0.1 * equivalent)
                square.mul_(0.999).add_(0.001 * equivalent**2)
                unbiased = square / (1 - 0.999 ** (step + 1))
                u_a, u_b = nearest(a, b, s, mean / (1 - 0.9 ** (step + 1)) / (unbiased.sqrt() + 1e-8))
                a.mul_(1 - rate * DECAY).sub_(rate * u_a)
                b.mul_(1 - rate * DECAY).sub_(rate * u_b)
                a.grad = b.grad = None
        optimizer.step()
    # Where lora_B begins to leave 0, LoRA-Pro divides by it.
    assert_near(products(model), products(twin), 1e-3)


def test_full_mode_says_the_memory_that_it_takes_beforehand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(adapted(), tmp_path, LoRAPro())
    elements = sum(base.weight.numel() for *_, base in pairs(trainer.model))
    assert f"two moments of each of the {elements} adapted weights: {8 * elements / 1e9:.2g} GB" in caplog.text
    states = [trainer.optimizer.state[a] for _, a, *_ in pairs(trainer.model)]
    held = sum(state[name].numel() * 4 for state in states for name in ("lora_pro_mean", "lora_pro_square"))
    assert held == 8 * elements


# Flat-LoRA


@pytest.mark.parametrize("mode", ["hook", "swap"])
def test_flat_lora_is_noise_in_the_weights(tmp_path: Path, mode: str) -> None:
    model, batches = trained(tmp_path, FlatLoRA(sigma=0.3, mode=mode))
    twin = adapted(torch.float64)
    optimizer = adamw(twin)
    for step, batch in enumerate(batches):
        clean, merged = {}, weights(twin)
        strength = 0.3 * (1 - torch.tensor(torch.pi * step / STEPS).cos().item()) / 2
        for name, a, _, _, base in pairs(twin):
            source = torch.Generator().manual_seed(generator(42, step, name).initial_seed())
            normal = torch.randn(base.weight.shape, generator=source)
            deviations = strength * merged[name].norm(dim=1, keepdim=True) / a.shape[1] ** 0.5
            clean[name] = base.weight.data
            base.weight.data = base.weight.data + normal * deviations
        gradients(twin, batch, 0.5)
        for name, _, _, _, base in pairs(twin):
            base.weight.data = clean[name]
        optimizer.param_groups[0]["lr"] = linear(step, STEPS)
        optimizer.step()
    # The noise is float32 in the method.
    assert_near(matrices(model), matrices(twin), 1e-4)
    plain = train(adapted(torch.float64), tmp_path, max_grad_norm=0.5, weight_decay=DECAY)
    with pytest.raises(AssertionError):
        assert_near(matrices(plain.model), matrices(twin), 1e-2)
