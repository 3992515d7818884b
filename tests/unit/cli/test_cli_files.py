"""Files of rows and of models that a command takes, or names in one sentence."""

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.support.commands import refused, run
from tests.support.tiny import VOCABULARY


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl.gz", ".csv.gz"])
def test_other_files_give_the_same_profile(
    tmp_path: Path, model: Path, data: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    dataset = datasets.load_dataset("json", data_files=str(data), split="train")
    other = tmp_path / f"other{suffix.removesuffix('.gz')}"
    write = {".parquet": dataset.to_parquet, ".csv": dataset.to_csv}.get(other.suffix, dataset.to_json)
    write(str(other))
    if suffix.endswith(".gz"):
        zipped = other.with_name(f"{other.name}.gz")
        zipped.write_bytes(gzip.compress(other.read_bytes()))
        other = zipped
    for path, output in ((data, "a.json"), (other, "b.json")):
        run(monkeypatch, "probe", model, path, "-o", tmp_path / output)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["data_fingerprint"] == second["data_fingerprint"]


ROW = b'{"text": "word1 word2"}\n'
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("jsonl", b"", "is empty; expected rows"),
    "empty table": ("csv", b"", "is empty; expected rows"),
    "empty Parquet": ("parquet", b"", "is empty; expected rows"),
    "no rows": ("csv", b"text\n", "cannot be read as csv"),
    "broken": ("jsonl", ROW + b'{"text": \n', "cannot be read as json: ArrowInvalid: JSON parse error"),
    "cut off": ("json", b'[{"text": "a"}, {"te', "cannot be read as json"),
    "no Parquet": ("parquet", ROW, "cannot be read as parquet: ArrowInvalid: Parquet"),
    "Latin-1 table": ("csv", "text\ngrößer\n".encode("latin-1"), "cannot be read as csv: UnicodeDecodeError: 'utf-8'"),
    "Latin-1": ("jsonl", '{"text": "größer"}\n'.encode("latin-1") * 60, "jsonl: UnicodeDecodeError: 'utf-8' codec"),
    "no gzip": ("jsonl.gz", ROW, "cannot be read as json: BadGzipFile"),
    "half a gzip": ("csv.gz", gzip.compress(b"text\n" + ROW * 99)[:40], "cannot be read as csv: EOFError"),
    "gzip of something": ("tar.gz", gzip.compress(ROW), "ends in '.gz'; expected one of"),
    "binary": ("jsonl", bytes(range(256)), "cannot be read as json"),
    "null": ("jsonl", ROW + b'{"text": null}\n' * 60, "jsonl: text is None; expected text"),
    "number": ("jsonl", b'{"text": 3}\n' * 60, "jsonl: text is 3; expected text"),
    "list": ("jsonl", b'{"text": ["a", "b"]}\n' * 60, "jsonl: text is ['a', 'b']; expected text"),
    "null completion": ("jsonl", b'{"prompt": "a", "completion": null}\n' * 60, "jsonl: the SFTTrainer of trl"),
    "half a pair": ("jsonl", b'{"text_a": "a", "text_b": 3}\n' * 60, "jsonl: text_b is 3; expected text"),
    "no field": ("csv", b"words\na\n" * 60, "csv: it has the fields words; expected input_ids"),
    "no messages": ("jsonl", b'{"messages": null}\n' * 60, "jsonl: "),
    "messages without a template": ("jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n' * 60, "jsonl: "),
    "null for tokens": ("jsonl", b'{"input_ids": null}\n' * 60, "jsonl: input_ids is None; expected a list"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_data_that_cannot_be_used_is_named_in_one_sentence(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ending, content, sentence = FILES[kind]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content)
    said = refused(monkeypatch, capsys, "probe", model, path)
    assert sentence in said
    assert re.match(rf"gelora: (Row \d+ of )?{re.escape(str(path))}\b", said)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"input_ids": [5, VOCABULARY]}, f"input_ids has the token {VOCABULARY}, and the model's vocabulary"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "2 input_ids and 1 of attention_mask"),
        ({"input_ids": [5, None]}, "input_ids of a row is [5, None]; expected a list of whole numbers"),
        ({"input_ids": "abc"}, "input_ids of a row is 'abc'; expected a list of whole numbers"),
    ],
)
def test_token_ids_that_cannot_be_used_are_one_sentence(
    tmp_path: Path,
    model: Path,
    row: dict[str, object],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row] if isinstance(row["input_ids"], str) else [row, *({"input_ids": [i, i + 1]} for i in range(60))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sentence in refused(monkeypatch, capsys, "probe", model, tmp_path / "rows.jsonl")


MODELS: dict[str, tuple[str, bytes | None, str]] = {
    "architecture that transformers has not": (
        "config.json",
        b'"architectures": ["NoSuchModel"]',
        "'NoSuchModel', which",
    ),
    "architecture that is none": ("config.json", b'"architectures": [3]', "the architecture 3, which transformers"),
    "architecture that is no model": ("config.json", b'"architectures": ["torch"]', "the architecture 'torch', which"),
    "architectures that are none": ("config.json", b'"architectures": 3', "cannot be loaded"),
    "type that transformers has not": ("config.json", b'"model_type": "nothing"', "cannot be loaded"),
    "no configuration": ("config.json", None, "cannot be loaded"),
    "binary configuration": ("config.json", bytes(range(256)), "cannot be loaded"),
    "broken weights": ("model.safetensors", b"abc", "cannot be loaded"),
    "no weights": ("model.safetensors", None, "cannot be loaded"),
    "other sizes": ("config.json", b'"hidden_size": 18', "cannot be loaded"),
    "broken tokenizer": ("tokenizer.json", b"{", "cannot be loaded"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_cannot_be_loaded_is_named_in_one_sentence(
    model: Path, data: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, sentence = MODELS[kind]
    path = model / name
    if content is None:
        path.unlink()
    elif content.startswith(b'"'):
        path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(b"{" + content + b"}")))
    else:
        path.write_bytes(content)
    said = refused(monkeypatch, capsys, "probe", model, data)
    assert str(model) in said
    assert sentence in said
