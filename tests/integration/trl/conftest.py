"""A saved tiny model with a tokenizer, and a policy whose ranks are known."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from gelora_plugins.demo import smollm2
from gelora_plugins.plugins import plugin_manager
from tests.support.tiny import build
from tests.support.trl_runs import CHAT, FixedRanks


@pytest.fixture(scope="module")
def fixed_policy() -> Iterator[None]:
    plugin = FixedRanks()
    plugin_manager().register(plugin, "fixed ranks")
    yield
    plugin_manager().unregister(plugin)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def model_path(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    build(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
