"""A measurement leaves no trace on the model, nor on the random state."""

import contextlib
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from gelora_plugins.errors import ProbeError
from gelora_plugins.probe import pooling
from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.probe.no_trace import brought_to
from tests.support import probing
from tests.support.probing import features_of_rows, random_rows
from tests.support.tiny import BLOCKS, build


def odd_model():
    model = build("llama", attention_dropout=0.1).train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.train(False)
    model.model.layers[0].requires_grad_(False)
    return model


def trace(model):
    """Everything that measuring could leave behind."""
    hooks = [
        (name, key, list(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "_hooks" in key and isinstance(value, dict)
    ]
    return {
        "python": random.getstate(),
        "numpy": pickle.dumps(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "modes": [(name, module.training) for name, module in model.named_modules()],
        "hooks": hooks,
        "gradients": [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "tensors": {name: value.clone().numpy().tobytes() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone().numpy().tobytes() for name, value in model.named_buffers()},
        "config": model.config.to_dict(),
        "grad mode": torch.is_grad_enabled(),
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
    }


def drawing(hidden, mask):
    random.random()
    np.random.rand()
    torch.rand(1)
    return pooling.mean(hidden, mask)


def test_nothing_of_the_measurement_stays():
    model = odd_model()
    before = trace(model)
    features_of_rows(model, random_rows(), drawing)
    assert trace(model) == before


def test_nothing_stays_when_the_pooling_fails_in_the_middle():
    model = odd_model()
    before = trace(model)
    calls = []

    def failing(hidden, mask):
        calls.append(hidden)
        if len(calls) == BLOCKS + 3:  # inside the second batch
            raise RuntimeError("in the middle")
        return drawing(hidden, mask)

    with pytest.raises(ProbeError, match="in the middle"):
        features_of_rows(model, random_rows(), failing)
    assert trace(model) == before


def test_nothing_stays_when_the_batches_fail():
    model = odd_model()
    before = trace(model)

    def batches():
        torch.rand(1)
        yield {"input_ids": torch.tensor([[5, 6, 7]])}
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        probing.features_of(model, find_transformers_layout(model), batches(), pooling.mean)
    assert trace(model) == before


def test_hooks_of_the_user_stay():
    model = build("llama")
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    features_of_rows(model, random_rows())
    assert len(calls) == 3  # one a batch
    model(input_ids=torch.tensor([[5, 6]]))
    assert len(calls) == 4


class Scaled(nn.Module):
    """A parameter and a buffer of its own around a part, and a weight that it shares with an embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.register_buffer("shift", torch.ones(4))
        self.part = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = embedding.weight
        self.seen: list[str] = []

    def forward(self, hidden):
        inside = self.part(hidden) * self.scale + self.shift
        self.seen += [tensor.device.type for tensor in (inside, self.scale, self.part.weight, self.head.weight)]
        return self.head(inside)


def tied() -> nn.Sequential:
    embedding = nn.Embedding(7, 4)
    return nn.Sequential(embedding, Scaled(embedding))


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_is_on_the_device_while_it_runs_and_back_where_it_was_afterwards(fails):
    """The device is "meta", which no other tensor can be mixed with; nothing is computed there."""
    model = tied()
    held = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    wrong = model[1].part.register_forward_hook(lambda module, args, output: 1 / 0) if fails else None
    with contextlib.suppress(ZeroDivisionError), brought_to(model, torch.device("meta")):
        out = model(torch.tensor([[1, 2]]))
        assert out.device.type == "meta"
        assert model[1].seen == ["meta", "meta", "cpu", "cpu"], "a part that does not run is not there"
    if wrong is not None:
        wrong.remove()
    for name, parameter in model.named_parameters():
        assert parameter is held[name][0]
        assert parameter.data_ptr() == held[name][1]
    assert model[1].shift.device.type == "cpu"
    assert model[1].head.weight is model[0].weight
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 7)


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_points_are_the_same_where_modules_are_brought_to_the_device(family):
    model = build(family)
    rows = random_rows(seq2seq=family == "t5")
    expected = features_of_rows(model, rows)
    with brought_to(model, torch.device("cpu")):
        found = features_of_rows(model, rows)
    assert found.num_tokens == expected.num_tokens
    assert all(a.equal(b) for a, b in zip(found.points, expected.points, strict=True))
