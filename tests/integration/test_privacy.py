"""What is written about the training data: numbers and a digest, never the data."""

import json
import re
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast

from gelora_plugins import GeLoRACallback, GeLoRAConfig, cli
from tests.support.tiny import build
from tests.support.training import LORA, trainer_for

VOCABULARY = 100_000
IDS = range(98_000, 98_400)
WORDS = [f"confidential{i}" for i in range(400)]
ROWS = [
    {"input_ids": [IDS[(i + 7 * j * j) % 400] for j in range(3 + i % 5)], "text": " ".join(WORDS[i : i + 4])}
    for i in range(120)
]


def leaks(directory: Path) -> list[str]:
    """Files below the directory with a word or a token of the training data; digits within others do not count."""
    secret = re.compile(rb"confidential|(?<![\d.])98[0-3]\d\d(?![\d.])")
    return [str(path) for path in directory.rglob("*") if path.is_file() and secret.search(path.read_bytes())]


def test_the_report_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(build("llama", vocab_size=VOCABULARY), LoraConfig(**LORA))
    dataset = [{**row, "labels": row["input_ids"]} for row in ROWS]
    trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")), train_dataset=dataset).train()
    assert {"plan.json", "report.json", "report.md", "report.html"} <= {
        path.name for path in (tmp_path / "gelora").iterdir()
    }
    assert leaks(tmp_path / "gelora") == []
    assert "confidential" not in capsys.readouterr().out


def test_the_files_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel(dict(zip(WORDS, IDS, strict=True)) | {"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    build("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in ROWS))
    out = tmp_path / "out"
    for arguments in (
        ["probe", tmp_path / "model", data, "-o", out / "profile.json"],
        ["plan", out / "profile.json", "-o", out / "plan.json"],
        ["report", out / "plan.json", "-o", out / "report"],
    ):
        monkeypatch.setattr(sys, "argv", ["gelora", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
    assert leaks(out) == []
    shown = capsys.readouterr()
    assert "confidential" not in shown.out + shown.err


def test_the_search_for_leaks_finds_them(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"document": ROWS[3]["input_ids"]}))
    (tmp_path / "b.md").write_text(ROWS[3]["text"])
    (tmp_path / "c.json").write_text(json.dumps({"value": 3.98123, "other": 1981234}))
    assert sorted(Path(path).name for path in leaks(tmp_path)) == ["a.json", "b.md"]
