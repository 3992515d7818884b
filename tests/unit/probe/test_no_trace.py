"""A measurement leaves no trace on the model, nor on the random state."""

import pickle
import random

import numpy as np
import pytest
import torch

from gelora_plugins.errors import ProbeError
from gelora_plugins.probe import pooling
from gelora_plugins.probe.find_blocks import find_transformers_layout
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
