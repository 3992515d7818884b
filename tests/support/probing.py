"""The points of batches, as tests of features, layouts and probe sets compare them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gelora_plugins.layout import ModelLayout
from gelora_plugins.probe.documents import Batch
from gelora_plugins.probe.hidden_states import Pooling, collect_features
from gelora_plugins.probe.point_store import FeatureStore


@dataclass(frozen=True)
class PooledFeatures:
    points: tuple[Tensor, ...]
    num_tokens: int


ROOM = 64  # documents; no test reads more


def features_of(
    model: nn.Module, layout: ModelLayout, batches: Iterable[Batch], pooling: Pooling, **options: Any
) -> PooledFeatures:
    store = FeatureStore("memory", ROOM)
    num_tokens = collect_features(model, layout, batches, pooling, store, **options)
    return PooledFeatures(tuple(store), num_tokens)
