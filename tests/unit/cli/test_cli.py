"""The command line: what a user types, and what a user's mistake says."""

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.main import get_command

from gelora_plugins import RankPlan, cli, json_files, mistakes
from gelora_plugins.cli import EXAMPLES
from gelora_plugins.errors import ConfigError, ProbeError
from gelora_plugins.probe.formats import check_place
from tests.support.commands import refused, run
from tests.support.plans import make_plan


def test_probe_plan_and_report(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    run(monkeypatch, "probe", model, data, "-o", profile)
    assert "boundary   3" in capsys.readouterr().out
    run(
        monkeypatch, "plan", profile, "--policy", "budget", "--rank", 4, "--target-modules", "q_proj,v_proj", "-o", plan
    )
    capsys.readouterr()
    run(monkeypatch, "report", plan, "-o", tmp_path / "gelora")
    shown = capsys.readouterr().out
    loaded = RankPlan.load(plan)
    assert [site.name for site in loaded.sites] == [f"model.layers.{i}" for i in range(3)]
    assert loaded.num_base_parameters == 4 * 3 * (16 + 16 + 16 + 8)
    assert all(site.name in shown for site in loaded.sites)
    written = {path.name for path in (tmp_path / "gelora").iterdir()}
    assert written == {"plan.json", "report.html", "report.json", "report.md", "ranks.png"}
    plan.unlink()
    for place in (tmp_path, tmp_path / "gelora"):  # of a training, and of a report
        run(monkeypatch, "report", place)
        assert capsys.readouterr().out in shown


@pytest.mark.parametrize("command", ["report", "plan"])
def test_standard_output_is_json_alone_where_that_is_asked_for(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "source.json", tmp_path / "out"
    json_files.write_json(source, make_plan().to_dict() if command == "report" else make_plan().profile.to_dict())
    run(monkeypatch, command, source, "--json", "-o", output)
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["kind"] == "rank_report"
    assert found["plan"] == json.loads((output if command == "plan" else output / "plan.json").read_text())
    assert f"-> {output}" in printed.err


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_command_are_what_it_takes(name: str) -> None:
    command = get_command(cli.app).commands[name]
    assert EXAMPLES[name]
    for example in EXAMPLES[name]:
        program, said, *rest = shlex.split(example, comments=True)
        assert (program, said) == ("gelora", name)
        command.make_context(name, rest)
        assert example in command.epilog


def test_every_command_has_examples() -> None:
    assert {*EXAMPLES, "sft"} == set(get_command(cli.app).commands)


@pytest.mark.parametrize("data", ["nothing.jsonl", "nothing.csv.gz", "./a/b.json", "a/b/c.parquet", "/nothing/a.csv"])
@pytest.mark.parametrize("command", [["probe"], ["compare", "--task", "classification"]])
def test_a_mistyped_file_costs_no_loading_of_anything(command: list[str], data: str) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from gelora_plugins.cli import app;"
        f"print(CliRunner().invoke(app, {[*command, 'MODEL', data]!r}).exception);"
        "print('HEAVY', sorted({'torch', 'transformers', 'peft', 'trl', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"{data} is no file here and no dataset on the hub" in text
    assert "HEAVY []" in text


def test_what_can_be_on_the_hub_is_looked_for_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("imdb", "stanfordnlp/imdb", "owner/rows.json"):
        check_place(name)
    (tmp_path / "owner").mkdir()
    with pytest.raises(ProbeError, match=r"^owner/rows\.json is no file here"):
        check_place("owner/rows.json")


def test_rows_without_a_known_field_are_named_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"words": "a"}\n')
    said = refused(monkeypatch, capsys, "probe", tmp_path / "no model here", tmp_path / "rows.jsonl")
    assert "rows.jsonl: it has the fields words; expected input_ids" in said


def test_probe_sensitivity(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
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


@pytest.mark.parametrize("options", [["--device", "cpu"], ["--device-map", "auto"]])
def test_a_model_that_is_placed_has_the_same_profile(
    tmp_path: Path, model: Path, data: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "probe", model, data, "-o", tmp_path / "a.json")
    run(monkeypatch, "probe", model, data, *options, "-o", tmp_path / "b.json")
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first["estimates"] == second["estimates"]


def test_a_model_in_four_bits_is_measured_as_such(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "probe", model, data, "--load-in-4bit", "-o", tmp_path / "profile.json")
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert profile["model_fingerprint"].startswith("uint8:")
    assert len(profile["layout"]["stacks"][0]) == 3


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such model": (["probe", "{tmp}/nothing", "{data}"], "nothing cannot be loaded"),
    "no such data": (["probe", "{model}", "{tmp}/nothing.jsonl"], "is no file here and no dataset"),
    "another format": (["probe", "{model}", "{model}/config.toml"], "ends in '.toml'"),
    "unknown estimator": (["probe", "{model}", "{data}", "--estimator", "x"], "twonn, twonn_mle"),
    "unknown task": (["probe", "{model}", "{data}", "--task", "x"], "expected auto or one of: causal-lm"),
    "unknown dtype": (["probe", "{model}", "{data}", "--dtype", "x"], "expected auto, float32"),
    "unknown device": (["probe", "{model}", "{data}", "--device", "x"], "model cannot be loaded: "),
    "two ways to place it": (
        ["probe", "{model}", "{data}", "--device", "cpu", "--device-map", "auto"],
        "--device is 'cpu' and --device-map is 'auto'; give one of them",
    ),
    "no such field": (["probe", "{model}", "{other}"], "other.jsonl: it has the fields words; expected input_ids"),
    "target without end": (["probe", "{model}", "{data}", "--target-std-error", "inf"], "expected a positive number"),
    "target that is none": (["probe", "{model}", "{data}", "--target-std-error", "nan"], "expected a positive number"),
    "huge seed": (["probe", "{model}", "{data}", "--probe-seed", str(2**64)], "probe_seed is more than 4294967295"),
    "huge number": (["probe", "{model}", "{data}", "--probe-samples", "9" * 400], "probe_samples is more than"),
    "a folder to write to": (["plan", "{profile}", "-o", "{tmp}"], "cannot be written"),
    "nothing to write to": (["plan", "{profile}", "-o", ""], "cannot be written"),
    "the root to write to": (["plan", "{profile}", "-o", "/"], "cannot be written"),
    "alpha without end": (["plan", "{profile}", "--alpha", "inf"], "lora_alpha is inf; expected positive numbers"),
    "alpha that is none": (["plan", "{profile}", "--alpha", "nan"], "lora_alpha is nan; expected positive numbers"),
    "a file in the way": (["report", "{plan}", "-o", "{data}/report"], "cannot be written"),
    "binary profile": (["plan", "{binary}"], "is not JSON"),
    "a folder for a profile": (["plan", "{tmp}"], "cannot be read"),
    "export of a file": (["export", "{data}", "{tmp}/out", "--uniform"], "has no adapter_config.json"),
    "huge rank multiple": (["export", "{tmp}", "{tmp}/out", "--uniform", "--rank-multiple", "9" * 30], "rank multiple"),
    "no configuration file": (["sft", "--config", "{tmp}/nothing.yaml"], "the file of --config, cannot be used"),
    "broken configuration file": (["sft", "--config", "{broken_yaml}"], "broken.yaml"),
    "unknown key": (["sft", "--config", "{plan}"], "the file of --config, cannot be used"),
    "binary configuration file": (["sft", "--config", "{binary}"], "the file of --config, cannot be used"),
    "no profile": (["plan", "{tmp}/nothing.json"], "nothing.json cannot be read"),
    "not a profile": (["plan", "{data}"], "is not JSON"),
    "no plan there": (["report", "{model}"], "model has neither gelora/plan.json nor plan.json. Give a plan, or"),
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
    places = {name: tmp_path / f"{name}.json" for name in ("plan", "profile", "binary")}
    places |= {"other": tmp_path / "other.jsonl", "broken_yaml": tmp_path / "broken.yaml"}
    places["other"].write_text('{"words": "a"}\n' * 60)
    places["broken_yaml"].write_text("a: [")
    places["binary"].write_bytes(bytes(range(256)))
    make_plan().save(places["plan"])
    json_files.write_json(places["profile"], make_plan().profile.to_dict())
    (model / "config.toml").write_text("a")
    arguments, sentence = MISTAKES[mistake]
    places |= {"tmp": tmp_path, "model": model, "data": data}
    said = refused(monkeypatch, capsys, *(argument.format(**places) for argument in arguments))
    assert sentence in said


@pytest.mark.parametrize("rank", ["0", "-1", "65537", "9" * 400, "1e3", "x"])
@pytest.mark.parametrize("command", [["plan", "profile.json"], ["probe", "model", "rows.jsonl"]])
def test_a_rank_that_no_adapter_has_is_a_wrong_option(
    command: list[str], rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *command, "--rank", rank)
    assert caught.value.code == 2
    assert "Invalidvalueforrank" in re.sub(r"\W", "", capsys.readouterr().err)  # whatever the terminal's width


def test_what_a_terminal_acts_on_does_not_reach_it_from_an_error(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"\x1b]0;title\x07": "a"}) + "\n")
    said = refused(monkeypatch, capsys, "probe", model, data)
    assert r"the fields \x1b]0;title\x07; expected" in said


def test_a_fault_of_the_program_is_no_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fault(*arguments: object) -> None:
        raise KeyError("a fault")

    make_plan().save(tmp_path / "plan.json")
    monkeypatch.setattr("gelora_plugins.cli.report.show", fault)
    monkeypatch.setattr(sys, "argv", ["gelora", "report", str(tmp_path / "plan.json")])
    with pytest.raises(KeyError, match="a fault"):
        cli.main()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "a.json"), "PermissionError: [Errno 13] Permission denied: 'a.json'"),
        (ModuleNotFoundError("No module named 'trl'", name="trl"), 'pip install "gelora[trl]"'),
        (ModuleNotFoundError("No module named 'gelora_plugins.x'", name="gelora_plugins.x"), None),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
        (json.JSONDecodeError("Expecting value", "", 0), "JSONDecodeError: Expecting value"),
        (ValueError("of ours"), None),
        (TypeError("of ours"), None),
        (AssertionError(), None),
    ],
)
def test_what_is_a_users_and_what_is_a_fault(error: Exception, said: str | None) -> None:
    found = mistakes.sentence(error)
    assert found is None if said is None else said in str(found)


def test_of_a_pydantic_error_only_the_messages_are_said() -> None:
    from pydantic import BaseModel, ValidationError, field_validator

    class Model(BaseModel):
        rank: int

        @field_validator("rank")
        @classmethod
        def check(cls, value: int) -> int:
            raise ConfigError(f"rank is {value}; expected more.")

    with pytest.raises(ValidationError) as caught:
        Model(rank=1)
    assert mistakes.sentence(caught.value) == "rank is 1; expected more."


def test_the_version_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"gelora {version('gelora')}\n"


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from gelora_plugins.cli import app;"
        "print(CliRunner().invoke(app, ['--help']).output);"
        "print('HEAVY', sorted({'torch', 'transformers', 'peft', 'trl', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f" {name} " in text for name in ("demo", "probe", "plan", "report", "sft"))
    assert "HEAVY []" in text
