from itertools import islice
from pathlib import Path
from pydoc_data import topics

import pytest

from gelora_plugins.demo import MODEL
from tests.support.letters import tokenizer
from tests.support.tiny import build


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the name of the model on the hub is a tiny model with a tokenizer of single letters."""
    tokenizer().save_pretrained(tmp_path / MODEL)
    build("llama").save_pretrained(tmp_path / MODEL)
    monkeypatch.setattr(topics, "topics", dict(islice(topics.topics.items(), 16)))  # a tenth, but of single letters
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)  # half the time
    monkeypatch.chdir(tmp_path)
    return tmp_path
