"""`select_ranks` with a tokenizer: rows of text and chats, read as the command line reads them."""

from importlib import import_module
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

from gelora_plugins import GeLoRAConfig, select_ranks
from gelora_plugins.errors import GeLoRAError, ProbeError
from tests.support.letters import texts, tokenizer
from tests.support.tiny import build

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
TEXTS = texts()


def with_template() -> Any:
    made = tokenizer()
    made.chat_template = CHAT
    return made


def select(rows: Any, **options: Any) -> Any:
    given = {"tokenizer": with_template(), "lora_config": LoraConfig(**LORA), "progress": False, **options}
    return select_ranks(build("llama"), rows, GeLoRAConfig(policy="budget"), **given)


ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "chat": [
        {"messages": [{"role": "user", "content": text[:2]}, {"role": "assistant", "content": text[2:]}]}
        for text in TEXTS
    ],
    "preference": [{"prompt": text[:2], "chosen": text[2:], "rejected": "no"} for text in TEXTS],
    "pair": [{"text_a": text[:2], "text_b": text[2:]} for text in TEXTS],
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_list_of_rows_gives_the_plan_of_the_same_data_set(kind: str) -> None:
    plan, same = select(ROWS[kind]), select(Dataset.from_list(ROWS[kind]))
    assert plan.ranks == same.ranks
    assert plan.profile.data_fingerprint == same.profile.data_fingerprint
    assert plan.profile.num_documents == len(TEXTS)


def test_text_of_another_field_is_measured_like_its_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TRL, which adds the end of text that it trains on."""
    own_loop = import_module("gelora_plugins.integrations.own_loop")
    monkeypatch.setattr(own_loop, "find_spec", lambda name: None)
    words = select([{"words": text} for text in TEXTS], text_field="words")
    ids = select([{"input_ids": tokenizer()(text)["input_ids"]} for text in TEXTS], tokenizer=None)
    assert words.profile.data_fingerprint == ids.profile.data_fingerprint
    assert words.ranks == ids.ranks


def test_rows_with_token_ids_are_taken_as_they_are() -> None:
    rows = [{"input_ids": tokenizer()(text)["input_ids"]} for text in TEXTS]
    assert select(rows).profile.data_fingerprint == select(rows, tokenizer=None).profile.data_fingerprint


REFUSED = {
    "a stream": (iter(ROWS["text"]), {}, r"^The rows are a list_iterator; .*expected a datasets.Dataset or a list"),
    "no known field": (
        [{"words": "a"}] * 60,
        {},
        r"^the data: it has the fields words; expected .*text_field, or --text",
    ),
    "rows that differ": ([{"text": "a"}, {"text": ["b"]}], {}, r"^The rows make no table: .*the same fields"),
    "no text": ([{"text": None}] * 60, {}, r"^Row \d+ of the data: "),
    "a collator too": (ROWS["text"], {"collator": list}, r"^Both a tokenizer and a collator were given"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_sentence(case: str) -> None:
    rows, options, message = REFUSED[case]
    with pytest.raises(ProbeError, match=message):
        select(rows, **options)


def test_without_a_tokenizer_text_is_refused_as_before() -> None:
    with pytest.raises(GeLoRAError, match="expected `input_ids`, or a collator"):
        select(ROWS["text"], tokenizer=None)
