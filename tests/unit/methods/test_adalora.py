"""AdaLoRA: what a rank scores, the budget, the term of orthogonality, the equal parameters of a comparison."""

import math

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from gelora_plugins.methods.adalora import AdaLoRA, smooth
from gelora_plugins.methods.base import orthogonality_gradient
from gelora_plugins.methods.gate_budget import Shrinking, strongest
from tests.support.methods import adapted, method_trainer
from tests.support.training import layers


def known():
    """(p, its gradient) of E, A and B."""
    values = {
        "gates": ([0.5, -1.0], [0.2, 0.1]),
        "a.x": ([[1.0, 2.0], [0.0, 1.0]], [[0.1, -0.1], [0.3, 0.2]]),
        "b.x": ([[1.0, 1.0], [2.0, 0.0], [0.0, -1.0]], [[0.1, 0.0], [0.1, 0.5], [0.2, 0.4]]),
    }
    for key, (value, gradient) in values.items():
        parameter = nn.Parameter(torch.tensor(value))
        parameter.grad = torch.tensor(gradient)
        yield key, parameter


def test_the_scores_at_the_known_answer():
    method = AdaLoRA()
    parameters = dict(known())
    method._means = {key: torch.zeros_like(p) for key, p in parameters.items()}
    method._spreads = {key: torch.zeros_like(p) for key, p in parameters.items()}
    method.gates = parameters["gates"]
    method.pairs = [type("Pair", (), {"name": "x"})]
    for expected, e_mean, e_spread in (
        ([9.88125e-4, 1.59375e-3], 0.015, 0.01275),
        ([3.107653e-3, 5.012344e-3], 0.02775, 0.021675),
    ):
        for key, parameter in parameters.items():
            smooth(method._means[key], method._spreads[key], parameter, 0.85)
        assert method._means["gates"].tolist() == pytest.approx([e_mean] * 2, rel=1e-6)
        assert method._spreads["gates"].tolist() == pytest.approx([e_spread] * 2, rel=1e-6)
        assert method.scores().tolist() == pytest.approx(expected, rel=1e-6)


def test_the_budget_at_the_known_answer():
    shrinking = Shrinking(steps=20, first=2, last=4, every=1)
    assert [shrinking.budget(step, 12, 8) for step in range(10)] == [12, 12, 12, 11, 10, 9, 9, 9, 8, 8]
    assert [shrinking.budget(step, 12, 8) for step in (16, 17, 19)] == [8, 8, 8]
    assert [step for step in range(20) if shrinking.masks(step)] == list(range(3, 17))


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 15, 20, 100, 300])
def test_the_shares_are_those_of_the_whole_numbers(steps):
    made = Shrinking.of_shares("adalora", steps, 0.1, 0.3, 0.01)
    assert (made.first, made.last, made.every) == (steps // 10, max(1, 3 * steps // 10), max(1, steps // 100))
    assert made.masks(made.end)
    assert not any(made.masks(step) for step in range(made.first + 1))
    assert not any(made.masks(step) for step in range(made.end + 1, steps))


def test_the_strongest_ranks_are_those_above_the_kth_smallest_score():
    torch.manual_seed(0)
    for kept in range(1, 13):
        scores = torch.rand(12)
        threshold = -math.inf if kept == 12 else scores.kthvalue(12 - kept)[0]
        assert strongest(scores.tolist(), [4, 4, 4], [10] * 3, 10 * kept + 9) == (scores > threshold).tolist()


def test_the_strongest_ranks_fill_the_budget_and_leave_each_module_what_it_must_keep():
    scores, sizes, costs = [9.0, 8.0, 1.0, 7.0, 2.0, 3.0], [3, 2, 1], [5, 3, 1]
    assert strongest(scores, sizes, costs, 14) == [True, True, False, True, False, True]  # 5 + 5 + 3 + 1
    assert strongest(scores, sizes, costs, 8) == [True, False, False, True, False, False]  # the second 5 does not fit
    assert strongest(scores, sizes, costs, 9, min_rank=1) == [True, False, False, True, False, True]
    assert strongest(scores, sizes, costs, 18, min_rank=2) == [True, True, False, True, True, True]
    assert strongest([1.0, 1.0], [2], [1], 1) == [True, False]  # ties: the first


def test_the_gradient_of_orthogonality_at_the_known_answer_and_by_autograd():
    assert orthogonality_gradient(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [
        pytest.approx([1.154701, 1.154701], rel=1e-6),
        pytest.approx([2.309401, 1.154701], rel=1e-6),
    ]
    assert not orthogonality_gradient(torch.eye(3)).any()
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.linalg.norm(matrix @ matrix.T - torch.eye(3)).backward()
    torch.testing.assert_close(orthogonality_gradient(matrix), matrix.grad, atol=1e-5, rtol=1e-5)


class Count(TrainerCallback):
    """The LoRA parameters whose E is not 0, after each step."""

    def __init__(self, method):
        self.method, self.counts = method, []

    def on_step_end(self, args, state, control, **kwargs):
        on = [int((part != 0).sum()) for part in self.method.parts(self.method.gates)]
        self.counts.append(sum(n * cost for n, cost in zip(on, self.method.costs(), strict=True)))


def test_what_stays_is_within_the_budget_of_each_masked_step_by_less_than_a_rank(tmp_path):
    method = AdaLoRA(keep=0.5)
    count = Count(method)
    trainer = method_trainer(adapted(), tmp_path, method, count, max_steps=20)
    trainer.train()
    shrinking = Shrinking(20, 2, 6, 1)
    for step, found in enumerate(count.counts):
        budget = shrinking.budget(step, 696, 348)
        assert budget - 24 < found <= budget  # the cheapest rank has 24


def test_without_a_budget_below_the_adapter_nothing_is_masked(tmp_path):
    method = AdaLoRA(keep=1.0, orthogonality=0.0)
    count = Count(method)
    trainer = method_trainer(adapted(), tmp_path, method, count)
    trainer.train()
    assert count.counts == [696] * 8
    assert [layer.r["default"] for layer in layers(trainer.model).values()] == [3, 4, 1] * 3


def test_a_planned_method_ends_with_the_parameters_of_the_plan(tmp_path):
    names = list(layers(adapted()))
    costs = [sum((layer.in_features, layer.out_features)) for layer in layers(adapted()).values()]
    ranks = [3, 2, 1, 1, 4, 2, 5, 1, 1]
    method, begin = AdaLoRA(beta=0.9).planned(ranks, costs)
    assert begin == (5, 3, 2, 2, 6, 3, 8, 2, 2)
    assert method.options() == {**AdaLoRA(beta=0.9).options(), "budget": method.budget, "min_rank": 1}
    pattern = {f"^{name.removeprefix('base_model.model.')}": rank for name, rank in zip(names, begin, strict=True)}
    trainer = method_trainer(adapted(rank_pattern=pattern), tmp_path, method, max_steps=20)
    trainer.train()
    left = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    budget = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert budget - min(costs) < left <= budget


def test_the_draw_is_of_each_module_and_seed_alone(tmp_path):
    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                drawn.append({p.name: (raw.clone(), p.b.clone()) for p, raw in zip(m.pairs, m.raw, strict=True)})

    drawn = []
    for targets, seed in ((["q_proj", "k_proj"], 42), (["q_proj"], 42), (["q_proj"], 43)):
        m = AdaLoRA()
        method_trainer(adapted(target_modules=targets), tmp_path, m, Keep(), seed=seed, max_steps=2).train()
    name = "model.layers.0.self_attn.q_proj"
    both, one, other = (entry[name] for entry in drawn)
    assert both[0].equal(one[0])
    assert both[1].equal(one[1])
    assert not one[0].equal(other[0])
    assert not drawn[1]["model.layers.1.self_attn.q_proj"][0].equal(one[0])
    entries = torch.cat([matrix.flatten() for pair in drawn[0].values() for matrix in pair])
    assert entries.std().item() == pytest.approx(0.02, rel=0.2)  # of some 600 numbers
