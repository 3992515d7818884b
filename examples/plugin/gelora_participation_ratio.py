"""An estimator, and a layout for a model that transformers does not know, added to gelora by a plugin.

After `pip install ./examples/plugin`: `GeLoRAConfig(estimator="participation_ratio")`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gelora_plugins import Block, DimensionEstimate, ModelLayout, hookimpl
from gelora_plugins.probe.find_blocks import linears_of


def participation_ratio(points: Tensor) -> DimensionEstimate:
    """(sum of eigenvalues)^2 / (sum of their squares) of the covariance: a linear dimension, (n, D) -> value."""
    spectrum = torch.linalg.svdvals((points - points.mean(dim=0)).double()).square()
    return DimensionEstimate(value=float(spectrum.sum() ** 2 / spectrum.square().sum()), num_points=len(points))


@hookimpl
def register_estimators() -> Mapping[str, Callable[..., Any]]:
    return {"participation_ratio": participation_ratio}


@hookimpl
def find_model_layout(model: nn.Module) -> ModelLayout | None:
    """The blocks of a model of your own; None for every other model, so that the next plugin is asked."""
    if type(model).__name__ != "MyModel":
        return None
    blocks = tuple(Block(f"blocks.{i}", tuple(linears_of(b, f"blocks.{i}"))) for i, b in enumerate(model.blocks))
    return ModelLayout(model_type="my-model", backbone="", stacks=(blocks,))
