"""The command line: what a user types, and what a user's mistake says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gelora_plugins import RankPlan, cli
from tests.tiny import VOCABULARY, build

PROSE = [f"word{i % 89} word{i * 7 % 83} word{i * i % 79} word{i * 3 % 11}" for i in range(120)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gelora", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    if caught.value.code:
        raise caught.value


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


def test_probe_plan_and_report(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    run(monkeypatch, "probe", model, data, "-o", profile)
    assert "boundary   3" in capsys.readouterr().out
    run(
        monkeypatch, "plan", profile, "--policy", "budget", "--rank", 4, "--target-modules", "q_proj,v_proj", "-o", plan
    )
    capsys.readouterr()
    run(monkeypatch, "report", plan, "-o", tmp_path / "report")
    shown = capsys.readouterr().out
    loaded = RankPlan.load(plan)
    assert [site.name for site in loaded.sites] == [f"model.layers.{i}" for i in range(3)]
    assert loaded.num_base_parameters == 4 * 3 * (16 + 16 + 16 + 8)
    assert all(site.name in shown for site in loaded.sites)
    assert (tmp_path / "report" / "ranks.png").is_file()


def test_probe_sensitivity(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--standardise", "--feature-storage", "disk"]
    run(monkeypatch, "probe", model, data, "-o", tmp_path / "alone.json", *options)
    capsys.readouterr()
    run(monkeypatch, "probe", model, data, "-o", tmp_path / "profile.json", "--sensitivity", "--rank", 4, *options)
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "sensitivity.json").read_text())
    assert all(outcome["setting"]["name"] in shown for outcome in found["outcomes"])
    assert "budget: at r = 4, its mean." in shown
    assert found["base_rank"] == 4
    alone, profile = (json.loads((tmp_path / name).read_text()) for name in ("alone.json", "profile.json"))
    assert profile == found["profile"]
    assert profile["standardise"] is True
    assert {**profile, "seconds": 0} == {**alone, "seconds": 0}


def test_probe_stops_at_the_target(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, sentence in (("1000", "(1000 was asked)"), ("1e-6", "target_std_error of 1e-06 was not reached")):
        run(monkeypatch, "probe", model, data, "-o", tmp_path / "profile.json", "--target-std-error", target)
        assert sentence in capsys.readouterr().out
        assert json.loads((tmp_path / "profile.json").read_text())["target_std_error"] == float(target)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl.gz"])
def test_other_files_give_the_same_profile(
    tmp_path: Path, model: Path, data: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    dataset = datasets.load_dataset("json", data_files=str(data), split="train")
    other = tmp_path / f"train{suffix}"
    write = {".parquet": dataset.to_parquet, ".csv": dataset.to_csv}.get(suffix, dataset.to_json)
    write(str(other), **({"compression": "gzip"} if suffix == ".jsonl.gz" else {}))
    for path, output in ((data, "a.json"), (other, "b.json")):
        run(monkeypatch, "probe", model, path, "-o", tmp_path / output)
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["data_fingerprint"] == second["data_fingerprint"]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such model": (["probe", "{tmp}/nothing", "{data}"], "nothing cannot be loaded"),
    "no such data": (["probe", "{model}", "{tmp}/nothing.jsonl"], "is no file here and no dataset"),
    "another format": (["probe", "{model}", "{model}/config.toml"], "ends in '.toml'"),
    "unknown estimator": (["probe", "{model}", "{data}", "--estimator", "x"], "twonn, twonn_mle"),
    "unknown task": (["probe", "{model}", "{data}", "--task", "x"], "expected auto or one of: causal-lm"),
    "unknown dtype": (["probe", "{model}", "{data}", "--dtype", "x"], "expected auto, float32"),
    "no such field": (["probe", "{model}", "{other}"], "A row has the fields words; expected input_ids, messages"),
    "no profile": (["plan", "{tmp}/nothing.json"], "nothing.json cannot be read"),
    "not a profile": (["plan", "{data}"], "is not JSON"),
    "not a plan": (["report", "{model}/config.json"], "is no usable rank plan"),
    "no such storage": (
        ["probe", "{model}", "{data}", "--feature-storage", "x"],
        "expected one of: memory, half, disk",
    ),
    "bad target": (["probe", "{model}", "{data}", "--target-std-error", "0"], "expected a positive number"),
    "bad number": (["probe", "{model}", "{data}", "--probe-samples", "0"], "probe_samples is 0; expected a whole"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    model: Path,
    data: Path,
    mistake: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"words": "a"}\n' * 60)
    (model / "config.toml").write_text("")
    arguments, sentence = MISTAKES[mistake]
    places = {"tmp": tmp_path, "model": model, "data": data, "other": other}
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *(argument.format(**places) for argument in arguments))
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gelora: ")]
    assert len(lines) == 1
    assert sentence in lines[0]


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from gelora_plugins.cli import app;"
        "print(CliRunner().invoke(app, ['--help']).output);"
        "print('HEAVY', sorted({'torch', 'transformers', 'peft', 'trl', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f" {name} " in text for name in ("demo", "probe", "plan", "report", "sft"))
    assert "HEAVY []" in text
