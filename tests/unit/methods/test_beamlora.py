"""BeamLoRA: weights and their gradient, what is pruned and copied, and when."""

import math

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from gelora_plugins.methods.beamlora import BeamLoRA, weakest
from tests.support.methods import adapted, logits, method_trainer
from tests.support.training import layers, matrices

X, Y = [2.5, 1.0, 0.4, 0.1], [1.6, 1.2, 0.9, 0.3]


def beam(sizes, **options):
    """A BeamLoRA with the gates of modules of these ranks, all 0."""
    method = BeamLoRA(**options)
    width = max(sizes)
    method.sizes, method._width = sizes, width
    method.pairs = [None] * len(sizes)
    method._places = torch.tensor([i * width + j for i, size in enumerate(sizes) for j in range(size)])
    method.gates = nn.Parameter(torch.zeros(sum(sizes)))
    return method


def test_the_weights_and_their_gradient_at_the_known_answer():
    method = beam([4])
    method.gates.data = torch.tensor([0.05, 0.0, 0.0, -0.05])
    assert method.factors().tolist() == pytest.approx([2.137787, 0.786448, 0.786448, 0.289318], abs=1e-6)
    gradient = method.pull_back(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert gradient.tolist() == pytest.approx([19.90507, -8.40629, -8.40629, -3.09250], abs=1e-4)


def test_the_weights_and_their_gradient_are_those_of_autograd_in_modules_of_other_ranks():
    method = beam([3, 1, 5], tau=0.5)
    source = torch.Generator().manual_seed(0)
    method.gates.data = torch.randn(9, generator=source)
    u = torch.randn(9, generator=source)
    gates = method.gates.detach().clone().requires_grad_()
    p = torch.cat([len(g) * torch.softmax(g / 0.5, 0) for g in gates.split([3, 1, 5])])
    p.backward(u)
    torch.testing.assert_close(method.factors(), p.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(method.pull_back(u), gates.grad, atol=1e-5, rtol=1e-5)
    assert method.pull_back(u)[3] == 0  # the module of rank 1
    for part in method.pull_back(u).split([3, 1, 5]):
        assert part.sum().abs() < 1e-5  # adding a constant to g changes nothing


def test_equal_gates_weigh_one_without_rounding_at_every_rank():
    sizes = list(range(1, 129))
    for value in (0.0, 0.3):
        method = beam(sizes)
        method.gates.data.fill_(value)
        assert (method.factors() == 1).all()


@pytest.mark.parametrize(
    ("keep", "scope", "expected"),
    [
        (0.93, "all", [{2, 3}, {3}]),
        (0.96, "all", [{3}, {3}]),
        (0.96, "module", [{2, 3}, {3}]),
        (0.5, "all", [{2, 3}, {2, 3}]),  # 1.0, .9, .4, .3 and .1 are beyond; no more than half of a module's
    ],
)
def test_what_is_pruned_at_the_known_answers(keep, scope, expected):
    found = weakest(torch.tensor(X + Y), [4, 4], keep, scope)
    assert [set(ranks.tolist()) for ranks in found] == expected


def test_the_smallest_of_the_pruned_come_first():
    (found,) = weakest(torch.tensor([0.2, 1.9, 0.1, 0.3, 2.5]), [5], 0.2, "all")
    assert found.tolist() == [2, 0]


def test_of_equal_ranks_the_first_are_the_strongest():
    p = torch.ones(4)
    (found,) = weakest(p, [4], 0.25, "all")  # all but the first are pruned
    assert found.tolist() == [3, 2]
    assert p.argsort(descending=True, stable=True).tolist() == [0, 1, 2, 3]


def test_a_module_of_rank_1_keeps_it():
    found = weakest(torch.tensor([1.0, 1.9, 0.1]), [1, 2], 0.1, "module")
    assert [ranks.tolist() for ranks in found] == [[], [1]]


def test_the_share_that_is_pruned_falls_to_0():
    method = BeamLoRA(until=0.5)
    assert method.pruned_share(0, 400) == 0.05
    assert method.pruned_share(100, 400) == pytest.approx(0.025)
    assert method.pruned_share(200, 400) == method.pruned_share(300, 400) == 0.0


class Event(TrainerCallback):
    """The gates, weights and matrices before and after an exchange of the given gates at step 4."""

    def __init__(self, method, gates):
        self.method, self.gates = method, gates
        exchange = method._exchange

        def watched(step, share):
            method.gates.data = torch.tensor(gates)
            self.copies = {key: value.clone() for key, value in method._copies.items()}
            self.before = (method.factors(), [raw.clone() for raw in method.raw])
            exchange(step, share)
            self.steps.append(step)
            self.after = (method.gates.tolist(), method.factors())

        self.steps, method._exchange = [], watched


@pytest.mark.parametrize(
    ("expand", "gates", "weights"),
    [
        ("average", [-0.01, 0.02, 0.0, -0.01], [0.79310, 1.44512, 0.96869, 0.79310]),
        (
            "preserve",
            [0.06 - 0.05 * math.log(2), 0.02, 0.0, 0.06 - 0.05 * math.log(2)],
            [1.14252, 1.02673, 0.68824, 1.14252],
        ),
    ],
)
def test_an_exchange_at_the_known_answer(tmp_path, expand, gates, weights):
    model = adapted(target_modules=["0.self_attn.q_proj"], rank_pattern={}, r=4)
    method = BeamLoRA(period=4, eta=0.05, expand=expand)
    event = Event(method, [0.06, 0.02, 0.0, -0.08])

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step == 4:
                pair = method.pairs[0]
                self.raw, self.b = method.raw[0].clone(), pair.b.detach().clone()
                self.moments = {
                    f"{key}_{kind}": optimizer.state[matrix][key].clone()
                    for kind, matrix in (("a", pair.a), ("b", pair.b))
                    for key in ("exp_avg", "exp_avg_sq")
                }
                self.gate_moments = (method.exp_avg.clone(), method.exp_avg_sq.clone())
                self.folded = pair.a.detach().clone()

    see = See()
    method_trainer(model, tmp_path, method, see).train()
    assert event.steps == [4]
    assert event.before[0].tolist() == pytest.approx([2.20832, 0.99226, 0.66513, 0.13429], abs=1e-5)
    assert event.after[0] == pytest.approx(gates, abs=1e-6)
    assert event.after[1].tolist() == pytest.approx(weights, abs=1e-5)
    name = "model.layers.0.self_attn.q_proj"
    assert see.raw[3].equal(event.copies[f"a.{name}"][0])  # the pruned rank is the strong one, as it was
    assert see.raw[:3].equal(event.before[1][0][:3])
    assert not see.raw[3].equal(event.before[1][0][3])
    assert see.b[:, 3].equal(event.copies[f"b.{name}"][:, 0])
    for key, moment in see.moments.items():
        axis = 0 if key.endswith("a") else 1
        copied = event.copies[f"{key}.{name}"].select(axis, 0)
        assert moment.select(axis, 3).equal(copied)
        assert copied.any()
    assert not any(moment.any() for moment in see.gate_moments)
    assert see.folded.equal(see.raw * event.after[1][:, None])


def test_exchanges_come_each_period_but_not_in_the_last_nor_after_the_share_is_0(tmp_path):
    def steps(**options):
        method = BeamLoRA(**options)
        event = Event(method, [0.0] * 24)
        method_trainer(adapted(), tmp_path, method, max_steps=12).train()
        return event.steps

    assert steps(period=2, until=1.0) == [2, 4, 6, 8, 10]
    assert steps(period=2) == [2, 4, 6, 8]  # c = 7 is below two thirds of 12, c = 9 is not
    assert steps(period=4) == [4, 8]
    assert steps(period=6) == [6]
    assert steps(period=6, eta=0.0) == []


@pytest.mark.parametrize(("steps", "period"), [(4, 2), (12, 2), (48, 4), (60, 4), (72, 6)])
def test_the_period_is_a_twelfth_of_the_training(tmp_path, steps, period):
    class Stop(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.period = method._period
            control.should_training_stop = True

    method, stop = BeamLoRA(), Stop()
    method_trainer(adapted(), tmp_path, method, stop, max_steps=steps).train()
    assert stop.period == period


def test_a_trained_adapter_goes_on_from_its_function_and_keeps_its_ranks(tmp_path):
    model = adapted()
    method_trainer(model, tmp_path, max_steps=2).train()
    before, held = logits(model), matrices(model)

    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            assert logits(model).equal(before)
            assert all(value.equal(held[name]) for name, value in matrices(model).items())
            self.ran = True

    first = First()
    method_trainer(model, tmp_path, BeamLoRA(eta=0.5, period=2, tau=0.5), first).train()
    assert first.ran
    assert [layer.r["default"] for layer in layers(model).values()] == [3, 4, 1] * 3


def test_moments_of_other_shapes_are_left_and_told_once(tmp_path, caplog):
    method = BeamLoRA(eta=0.5, period=2, tau=0.5)
    method_trainer(adapted(), tmp_path, method, optim="adafactor").train()
    assert caplog.text.count("beamlora copies matrices without what the optimizer has for them") == 1
