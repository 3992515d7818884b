"""Run in each environment that has Axolotl: `pytest tests/axolotl`. A plain environment collects nothing here."""

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

try:
    AXOLOTL = version("axolotl")
except PackageNotFoundError:
    AXOLOTL = None
    collect_ignore_glob = ["test_*.py"]
else:
    # Axolotl reads this when it is imported; without it, it tries to send.
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    sys.path.insert(0, str(EXAMPLES))


def pytest_report_header():
    """Say what is tested here."""
    return f"axolotl: {AXOLOTL or 'not installed, so tests/axolotl is not collected'}"


@pytest.fixture(scope="session")
def model():
    """The directory of SmolLM2-135M-Instruct."""
    given = os.environ.get("GELORA_TEST_MODEL")
    if given:
        return given
    from gelora_plugins.demo import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def small_model(model, tmp_path_factory):
    """The first 4 of its 30 blocks, so that most runs here are short."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tmp_path_factory.mktemp("model")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.model.layers = loaded.model.layers[:4]
    loaded.config.num_hidden_layers = 4
    loaded.config.layer_types = None
    loaded.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def workplace(small_model, tmp_path_factory):
    """A directory with data and the small model."""
    from axolotl_data import documents
    from harness import Workplace

    directory = tmp_path_factory.mktemp("workplace")
    rows = [json.dumps({"text": text}) + "\n" for text in documents()[:100]]
    (directory / "prose.jsonl").write_text("".join(rows))
    (directory / "few.jsonl").write_text("".join(rows[:9]))
    return Workplace(directory, small_model)
