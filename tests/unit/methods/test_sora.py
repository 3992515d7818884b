"""SoRA: both thresholds, a step by hand, its schedules, and what it says."""

import logging
from itertools import pairwise

import pytest
import torch
from transformers import TrainerCallback

from gelora_plugins.methods.sora import SoRA, official_threshold, soft_threshold
from tests.support.methods import Seen, adapted, logits, method_trainer
from tests.support.training import layers

GATES = [0.5, 0.25, 0.1875, 0.125, 0.0625, -0.1875, -0.5, 0.0]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (soft_threshold, [0.375, 0.125, 0.0625, 0.0, 0.0, -0.0625, -0.375, 0.0]),
        (official_threshold, [0.375, 0.125, 0.0, 0.125, 0.0, 0.0, -0.375, 0.0]),
    ],
)
def test_the_thresholds_at_the_known_answer(threshold, expected):
    gates = torch.tensor(GATES)
    assert threshold(gates, torch.full_like(gates, 0.125)).tolist() == expected
    assert threshold(gates, torch.zeros_like(gates)).tolist() == GATES


def test_a_step_at_the_known_answer(tmp_path):
    """g = [.5, -.2, .05], data gradient [1, 1, -2], λ/N = 1; AdamW's first step of .1; ξ = .02."""
    method = SoRA(shrinkage=0.16, l1=3.0)  # 8 steps, 3 gates

    class Known(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with torch.no_grad():
                method.gates.copy_(torch.tensor([0.5, -0.2, 0.05]))
            method.gates.grad = torch.tensor([1.0, 1.0, -2.0])
            method.regularise()
            found.append(method.gates.grad.tolist())
            method.optimizer.param_groups[0]["lr"] = 0.1
            with torch.no_grad():
                method.pairs[0].a.copy_(method.raw[0])
            method.on_optimizer_step(args, state, control)
            found.append(method.gates.tolist())
            control.should_training_stop = True

    found = []
    model = adapted(target_modules=["0.self_attn.q_proj"], rank_pattern={}, r=3)
    method_trainer(model, tmp_path, method, Known()).train()
    assert found[0] == [2.0, 0.0, -1.0]
    assert found[1] == pytest.approx([0.38, -0.18, 0.13], abs=1e-6)


class Gates(TrainerCallback):
    def __init__(self, method):
        self.method, self.seen = method, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.method.gates.detach().clone())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1] * 4),
        ("lr", [0.1, 0.075, 0.05, 0.025]),  # the learning rate falls to 0 along a line
        ("ramp", [0.025, 0.05, 0.075, 0.1]),
    ],
)
def test_what_a_gate_loses_in_each_step_follows_the_schedule(tmp_path, schedule, expected):
    method = SoRA(shrinkage=0.4, schedule=schedule, init="ones", gate_lr=0.0)
    gates = Gates(method)
    method_trainer(adapted(), tmp_path, method, gates, max_steps=4).train()
    seen = [1.0, *(float(g[0]) for g in gates.seen)]
    assert all(bool((g == g[0]).all()) for g in gates.seen)
    assert [a - b for a, b in pairwise(seen)] == pytest.approx(expected, abs=1e-6)


def test_a_shrinkage_that_nothing_withstands_leaves_the_base_model_and_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        seen = Seen()
        trainer = method_trainer(adapted(), tmp_path, SoRA(shrinkage=1e3), seen)
        trainer.train()
    assert logits(trainer.model).equal(seen.base)
    assert {layer.r["default"] for layer in layers(trainer.model).values()} == {1}
    assert "sora takes 1.2e+02 from each gate in a step, and a step of AdamW gives back 0.02 at most" in caplog.text


def test_gates_within_reach_are_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        method_trainer(adapted(), tmp_path, SoRA(shrinkage=0.1)).train()
    assert "sora" not in caplog.text


def test_a_gate_at_0_returns(tmp_path):
    method = SoRA(shrinkage=0.0, init="ones", deviation=1.0)

    class Zero(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    method.gates[0] = 0
                method.fold()

    gates = Gates(method)
    method_trainer(adapted(), tmp_path, method, Zero(), gates).train()
    assert gates.seen[2][0] == 0
    assert gates.seen[3][0] != 0


def test_the_budget_bounds_what_is_left_and_fewer_are_told(tmp_path, caplog):
    trainer = method_trainer(adapted(), tmp_path, SoRA(shrinkage=0.0, keep=0.5, min_rank=1))
    trainer.train()
    left = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert 348 - 24 < left <= 348  # of 696; the cheapest rank has 24
    with caplog.at_level(logging.WARNING):
        method_trainer(adapted(), tmp_path, SoRA(shrinkage=1e3, keep=0.5)).train()
    assert "sora leaves 0 LoRA parameters that add something, and was to leave 348. The other gates came" in caplog.text


def test_a_planned_method_has_a_budget(tmp_path):
    method, begin = SoRA(shrinkage=0.5).planned([4, 2], [10, 30])
    assert (method.budget, method.min_rank, method.shrinkage, begin) == (100, 1, 0.5, (6, 3))
