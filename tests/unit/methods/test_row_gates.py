"""The row-gate engine by itself: the chain rule, AdamW of the gates, what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from gelora_plugins.errors import ConfigError, MethodError
from gelora_plugins.methods.adalora import AdaLoRA
from gelora_plugins.methods.beamlora import BeamLoRA
from gelora_plugins.methods.row_gates import RowGates
from gelora_plugins.methods.sora import SoRA
from tests.support.methods import adapted, method_trainer
from tests.support.training import layers


class Given(RowGates):
    """Gates that are given."""

    name = "given"
    start = torch.tensor([2.0, -1.0])

    def draw(self):
        return self.start.clone()


class See(TrainerCallback):
    """Keeps what is there before the optimizer steps; comes after the method."""

    def __init__(self, method):
        self.method, self.gradients, self.rates = method, [], []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def one_module(**options):
    return adapted(target_modules=["0.self_attn.q_proj"], rank_pattern={}, r=2, **options)


def test_the_chain_rule_at_the_known_answer(tmp_path):
    method = Given()
    trainer = method_trainer(one_module(), tmp_path, method, max_grad_norm=0.0)
    model = trainer.model

    class Known(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            pair = method.pairs[0]
            method.raw = [torch.zeros_like(pair.a)]
            method.raw[0][:, :2] = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
            method.fold()
            assert pair.a[:, :2].tolist() == [[2.0, 4.0], [-3.0, 1.0]]
            pair.a.grad = torch.zeros_like(pair.a)
            pair.a.grad[:, :2] = torch.tensor([[0.5, 1.0], [-1.0, 2.0]])
            method.on_step_begin(args, state, control)
            method.on_pre_optimizer_step(args, state, control, model=model)
            found.extend([method.gates.grad.tolist(), pair.a.grad[:, :2].tolist(), pair.a[:, :2].tolist()])
            control.should_training_stop = True

    found = []
    trainer.add_callback(Known())
    trainer.train()
    assert found == [[2.5, -5.0], [[1.0, 2.0], [1.0, -2.0]], [[1.0, 2.0], [3.0, -1.0]]]


def test_the_gates_step_as_adamw_of_torch_does_with_the_rate_of_each_module(tmp_path):
    model = adapted()
    first, *others = [layer.lora_A["default"].weight for layer in layers(model).values()]
    bs = [layer.lora_B["default"].weight for layer in layers(model).values()]
    groups = [{"params": [first, *bs], "lr": 0.02}, {"params": others, "lr": 0.005}]

    class Ones(Given):
        def draw(self):
            return torch.ones(sum(self.sizes))

    method = Ones(gate_lr=3.0)

    class Compare(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if not hasattr(self, "twins"):
                gates = [torch.nn.Parameter(g.detach().clone()) for g in method.parts(method.gates)]
                rates = [0.02, *[0.005] * (len(gates) - 1)]
                made = [{"params": [g], "lr": 3 * rate} for g, rate in zip(gates, rates, strict=True)]
                self.optimizer = torch.optim.AdamW(made, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
                self.twins = gates
            for twin, gradient in zip(self.twins, method.parts(method.gates.grad), strict=True):
                twin.grad = gradient.clone()
            for group, rate in zip(self.optimizer.param_groups, method.groups(), strict=True):
                group["lr"] = 3 * rate["lr"]

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.optimizer.step()
            twins = torch.cat([twin.detach() for twin in self.twins])
            torch.testing.assert_close(method.gates.detach(), twins, atol=1e-6, rtol=1e-5)

    compare = Compare()
    options = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.0)
    method_trainer(model, tmp_path, method, compare, optimizers=(optimizer, None), **options).train()
    moved = [(twin - 1).abs().max().item() for twin in compare.twins]
    assert min(moved) > 1e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaLoRA(keep=0), "keep is 0; expected a share above 0 and up to 1."),
        (lambda: AdaLoRA(keep=1.5), "keep is 1.5; expected a share above 0 and up to 1."),
        (lambda: AdaLoRA(keep=None), "keep is None; expected a share, or a budget beside it."),
        (lambda: AdaLoRA(budget=0), "budget is 0; expected a whole number of parameters above 0."),
        (lambda: AdaLoRA(budget=10.5), "budget is 10.5; expected a whole number of parameters above 0."),
        (lambda: AdaLoRA(min_rank=-1), "min_rank is -1; expected a whole number >= 0."),
        (lambda: AdaLoRA(last=1.0), "last is 1.0; expected a share of at least 0 and below 1."),
        (lambda: AdaLoRA(beta=1), "beta is 1; expected a number between 0 and 1."),
        (lambda: AdaLoRA(orthogonality=-0.1), "orthogonality is -0.1; expected 0 or more."),
        (lambda: AdaLoRA(gate_lr=-1), "gate_lr is -1; expected 0 or more."),
        (lambda: SoRA(shrinkage=-1), "shrinkage is -1; expected 0 or more."),
        (lambda: SoRA(threshold="hard"), "threshold is 'hard'; expected one of: soft, official."),
        (lambda: SoRA(schedule="linear"), "schedule is 'linear'; expected one of: constant, lr, ramp."),
        (lambda: SoRA(init="zeros"), "init is 'zeros'; expected one of: normal, ones."),
        (lambda: BeamLoRA(tau=0), "tau is 0; expected a number above 0."),
        (lambda: BeamLoRA(period=3), "period is 3; expected an even number of steps, at least 2."),
        (lambda: BeamLoRA(eta=1), "eta is 1; expected a share of at least 0 and below 1."),
        (lambda: BeamLoRA(until=0), "until is 0; expected a share above 0 and up to 1."),
        (lambda: BeamLoRA(scope="block"), "scope is 'block'; expected one of: all, module."),
        (lambda: BeamLoRA(expand="half"), "expand is 'half'; expected one of: average, preserve."),
    ],
)
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (
            AdaLoRA(),
            {"max_steps": 1},
            "adalora chooses ranks after step 0 and up to step 0 of 1: there is none. Train ",
        ),
        (AdaLoRA(first=0.5, last=0.5), {}, "adalora chooses ranks after step 4 and up to step 4 of 8: there is none."),
        (
            AdaLoRA(budget=10**6),
            {},
            "adalora is to leave 1000000 LoRA parameters; the adapter has 696, and at least 24 ",
        ),
        (AdaLoRA(keep=0.01), {}, "adalora is to leave 6 LoRA parameters; the adapter has 696, and at least 24 stay."),
        (SoRA(keep=0.1, min_rank=1), {}, "sora is to leave 69 LoRA parameters; the adapter has 696, and at least 288 "),
        (BeamLoRA(), {"max_steps": 3}, "beamlora exchanges ranks every 2 steps but not in the last of them, and the "),
        (BeamLoRA(period=10), {}, "beamlora exchanges ranks every 10 steps but not in the last of them, and the train"),
    ],
)
def test_a_schedule_that_the_training_has_no_room_for_is_refused(tmp_path, method, options, words):
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(MethodError) as refused:
        method_trainer(model, tmp_path, method, **options).train()
    assert str(refused.value).startswith(words)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_shared_matrices_are_refused(tmp_path):
    model = adapted()
    first, _, _, second, *_ = layers(model).values()
    second.lora_A["default"].weight = first.lora_A["default"].weight
    with pytest.raises(
        MethodError, match=r"^beamlora gives each module gates of its own, and .*1\.self_attn\.q_proj shar"
    ):
        method_trainer(model, tmp_path, BeamLoRA()).train()


def test_an_optimizer_that_has_copies_is_refused(tmp_path):
    """As torchao's CPUOffloadOptimizer: its groups hold copies, and gradients go there in the backward pass."""

    class Offload(torch.optim.SGD):
        pass

    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = Offload([torch.nn.Parameter(p.detach().clone()) for p in trained], lr=0.1)
    optimizer.param_d2h_map = {p: p for p in trained}
    with pytest.raises(
        MethodError, match=r"^beamlora rewrites gradients before the step, and the optimizer has copies "
    ):
        method_trainer(model, tmp_path, BeamLoRA(), optimizers=(optimizer, None)).train()


def test_a_module_that_the_forward_pass_does_not_use_keeps_its_a(tmp_path: Path):
    model = adapted()
    block = model.get_base_model().model.layers[2]
    block.self_attn.k_proj.forward = lambda x: torch.zeros(*x.shape[:-1], 8)  # not by way of the adapter
    unused = block.self_attn.k_proj.lora_A["default"].weight
    before = unused.detach().clone()
    method_trainer(model, tmp_path, BeamLoRA(eta=0.0)).train()
    assert unused.equal(before)
    assert unused.grad is None
