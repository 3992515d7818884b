"""The command `gelora compare`."""

import json
import sys
from pathlib import Path

import pytest

from gelora_plugins import cli
from gelora_plugins.compare.bench import Bench
from tests.support.comparing import SETTINGS, Say, failing, result, rows, said, tiny_task, uneven, usual, valley


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gelora", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / ".rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60, 0)))
    return tmp_path


def save_plan(bench: Bench, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    uneven(bench).save(path)
    return path


def arguments_of(model: str, files: Path) -> tuple[object, ...]:
    options = f"--task classification --methods lora --seeds 3 --rank 4 --alpha 8 -o {files / 'out'}"
    options += " --allocations plan,uniform"
    return (model, files / ".rows.jsonl", *options.split(), "--target-modules", SETTINGS.target_modules)


def test_two_plans_of_one_name_are_refused(
    model: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(model, tiny_task(), SETTINGS, files)
    first, second = (save_plan(bench, files / folder / "plan.json") for folder in ("a", "b"))
    assert run_command(monkeypatch, *arguments_of(model, files), "--plan", first, "--plan", second) == 2
    error = capsys.readouterr().err
    assert "Two plans are called 'plan'" in error
    assert str(first) in error
    assert str(second) in error


def test_a_hidden_file_has_a_name_and_what_failed_is_an_exit_code(
    model: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], say: Say
) -> None:
    plan = save_plan(Bench(model, tiny_task(), SETTINGS, files), files / "a" / "plan.json")
    command = (*arguments_of(model, files), "--plan", plan)
    say(
        lambda bench, made: (
            failing(made, made.method == "plan") if made.method == "plan" else result(made, 0.5, valley(made))
        )
    )
    assert run_command(monkeypatch, *command) == 1
    shown = capsys.readouterr().out
    assert "rows: plan, plan: seed 1000 at the rate 0.0003, the head's" in shown
    assert "plan: uniform |" in shown
    say(said(lambda made: 0.5))
    assert run_command(monkeypatch, *command) == 0
    assert (files / "out" / "rows" / "runs.jsonl").is_file()


def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_trained(
    model: str, files: Path, monkeypatch: pytest.MonkeyPatch, say: Say, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = say(said(usual))
    assert run_command(monkeypatch, *arguments_of(model, files), "--name", "../../x") == 2
    assert "The task is called '../../x'" in capsys.readouterr().err
    assert not asked
    assert not (files / "out").exists()


def test_the_heads_rate_is_an_option(model: str, files: Path, monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    plan = save_plan(Bench(model, tiny_task(), SETTINGS, files), files / "a" / "plan.json")
    asked = say(said(lambda made: 0.5))
    options = ("--plan", plan, "--head-rate", "0.02", "--rates", "1e-3")
    assert run_command(monkeypatch, *arguments_of(model, files), *options) == 0
    assert {made.head_rate for made in asked} == {0.02}
