"""The points of batches, as tests of features, layouts and probe sets compare them."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.layout import ModelLayout
from gelora_plugins.probe import pooling
from gelora_plugins.probe.documents import Batch, choose_documents
from gelora_plugins.probe.find_blocks import find_transformers_layout
from gelora_plugins.probe.hidden_states import Pooling, collect_features
from gelora_plugins.probe.point_store import FeatureStore
from tests.support.tiny import VOCABULARY


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


LENGTHS = (9, 4, 7, 2, 12, 5, 1)  # all different: batches are sorted by length, and so can be told apart
CONFIG = GeLoRAConfig(probe_batch_size=3)


def random_rows(seq2seq=False):
    rng = random.Random(0)

    def ids(length):
        return [rng.randrange(5, VOCABULARY) for _ in range(length)]

    return [{"input_ids": ids(n), **({"labels": ids(14 - n)} if seq2seq else {})} for n in LENGTHS]


def is_seq2seq(model):
    return bool(model.config.is_encoder_decoder)


def features_of_rows(model, rows, pool=pooling.mean):
    batches = choose_documents(rows, CONFIG, model.config, None).batches(CONFIG.probe_batch_size)
    return features_of(model, find_transformers_layout(model), batches, pool)
