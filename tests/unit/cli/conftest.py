"""A saved tiny model with a tokenizer, and rows for it."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.commands import PROSE
from tests.support.tiny import VOCABULARY, build


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"word{i}": i + 3 for i in range(VOCABULARY - 3)} | {"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    directory = tmp_path / "model"
    build("llama").save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in PROSE))
    return path
