"""The noise of Flat-LoRA on one map: how much, where, when, and what it does to loss and gradients."""

from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from gelora_plugins.methods.base import Pair, generator
from gelora_plugins.methods.flat_lora import FlatLoRA

OUT, IN, RANK, STEPS = 64, 32, 3, 10


def four_bits(out, features):
    linear = bitsandbytes.nn.Linear4bit(features, out, quant_type="nf4", compute_dtype=torch.float32)
    return linear.to("cpu")  # which quantises


MAPS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "four bits": lambda: four_bits(OUT, IN),
}


def adapted(kind="linear"):
    """(module, pair) of one map with a trained adapter."""
    torch.manual_seed(0)
    model = nn.Sequential(MAPS[kind]())
    model.is_loaded_in_4bit = kind == "four bits"  # PEFT 0.21 takes it for quantised by this
    config = LoraConfig(r=RANK, lora_alpha=5, target_modules=["0"], fan_in_fan_out=kind == "Conv1D")
    layer = get_peft_model(model, config).base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    return layer, Pair("0", a, b, layer.scaling["default"], layer)


def clean_weight(pair):
    """W', (out, in)."""
    base = pair.layer.get_base_layer()
    if isinstance(base, bitsandbytes.nn.Linear4bit):
        weight = bitsandbytes.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    else:
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    return (weight + pair.scaling * pair.b @ pair.a).detach()


class Steps:
    """A FlatLoRA in a training of one pair."""

    def __init__(self, pair, **options):
        self.method = FlatLoRA(**{"sigma": 0.3, **options})
        self.method.pairs = (pair,)
        self.method.check()
        self.method.begin(None)
        self.method._running = True
        self.args = SimpleNamespace(seed=7)

    def begin(self, step):
        self.method.on_step_begin(self.args, SimpleNamespace(global_step=step, max_steps=STEPS), None)

    def end(self):
        self.method.on_pre_optimizer_step(self.args, None, None)


def noise(layer):
    """E (out, in) in the layer's output, seen by the unit inputs."""
    with torch.no_grad():
        here = layer(torch.eye(IN))
        layer.eval()
        clean = layer(torch.eye(IN))
        layer.train()
    return (here - clean).T


def normal(step):
    source = torch.Generator().manual_seed(generator(7, step, "0").initial_seed())
    return torch.randn(OUT, IN, generator=source)


@pytest.mark.parametrize("kind", MAPS)
def test_rows_have_noise_in_proportion_to_the_merged_weights(kind):
    layer, pair = adapted(kind)
    packed = layer.get_base_layer().weight.data.clone()
    steps = Steps(pair)
    strengths = []
    for step in (0, 5, 9):
        steps.begin(step)
        found = noise(layer)
        strengths.append(steps.method.strength(step, STEPS))
        deviations = strengths[-1] * clean_weight(pair).norm(dim=1) / IN**0.5
        # Differences of outputs of some 10, in float32; the noise is above 0.1.
        torch.testing.assert_close(found, normal(step) * deviations[:, None], rtol=1e-4, atol=2e-5)
        steps.end()
        assert noise(layer).eq(0).all()
    assert strengths == pytest.approx([0, 0.15, 0.3 * 0.97553], rel=1e-4)
    steps.method.close()
    assert layer.get_base_layer().weight.data.equal(packed)
    assert not layer.get_base_layer()._forward_hooks


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_noisy_weights_are_the_noise_of_the_hook_and_go_without_a_trace(kind):
    layer, pair = adapted(kind)
    weight = layer.get_base_layer().weight
    clean, steps = weight.data.clone(), Steps(pair, mode="swap")
    before = layer(torch.eye(IN)).detach()
    steps.begin(5)
    swapped = (layer(torch.eye(IN)).detach() - before).T
    steps.end()
    assert weight.data.equal(clean)
    hooked = Steps(pair)
    hooked.begin(5)
    torch.testing.assert_close(swapped, noise(layer), rtol=1e-4, atol=2e-5)  # as above


def test_noise_is_the_steps_own_and_that_of_training_only():
    layer, pair = adapted()
    steps = Steps(pair)
    steps.begin(5)
    first = noise(layer)
    assert first.equal(noise(layer))  # of another micro-batch
    layer.enable_adapters(False)  # as where the model is its own reference
    assert noise(layer).eq(0).all()
    layer.enable_adapters(True)
    steps.end()
    steps.begin(6)
    assert not noise(layer).equal(first)


def test_gradients_are_those_of_noisy_weights():
    layer, pair = adapted()
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def gradients():
        loss = layer(x).square().sum()
        return torch.autograd.grad(loss, [pair.a, pair.b, x])

    steps = Steps(pair)
    steps.begin(5)
    found = gradients()
    steps.end()
    weight = layer.get_base_layer().weight
    deviations = 0.15 * clean_weight(pair).norm(dim=1) / IN**0.5
    weight.data = weight.data + normal(5) * deviations[:, None]
    for ours, expected in zip(found, gradients(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_expected_loss_is_the_loss_and_the_noise_of_the_rows():
    layer, pair = adapted()
    x = torch.randn(1, IN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Near what is predicted: the product of residual and noise, whose mean is 0, varies most.
        y = layer(x) + 0.1 * torch.randn(1, OUT, generator=torch.Generator().manual_seed(2))
        clean = (layer(x) - y).square().sum().item()
        losses = []
        for seed in range(500):
            steps = Steps(pair)
            steps.args.seed = seed
            steps.begin(9)
            losses.append((layer(x) - y).square().sum().item())
            steps.method.close()
    drawn = torch.tensor(losses, dtype=torch.float64)
    deviations = steps.method.strength(9, STEPS) * clean_weight(pair).norm(dim=1) / IN**0.5
    added = (x.square().sum() * deviations.square().sum()).item()
    error = drawn.std().item() / len(losses) ** 0.5
    assert added > 20 * error
    # The draws are fixed by their seeds, so this holds everywhere or nowhere.
    assert drawn.mean().item() == pytest.approx(clean + added, abs=4 * error)
