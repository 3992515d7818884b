"""What is shown and reported of a training cannot end it, whatever the terminal and the plugins are like."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from gelora_plugins import GeLoRACallback, hookimpl
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.report.rank_report import RankReport, show, write_reports
from tests.support.plans import make_plan, plan_for
from tests.support.tiny import build
from tests.support.training import LORA, peft_model, ranks_by_block, saved_plan, trainer_for


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)  # half the time


def terminal(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_the_table_is_shown_in_every_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = terminal(encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    show(RankReport(make_plan()))
    shown = stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "model.layers.5" in shown
    assert ("─" if encoding == "utf-8" else "-----") in shown
    assert "?" not in shown


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def callback(tmp_path: Path) -> GeLoRACallback:
    plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA)).save(tmp_path / "plan.json")
    return GeLoRACallback(plan=str(tmp_path / "plan.json"))


def test_a_terminal_that_is_gone_does_not_end_a_training(
    tmp_path: Path, callback: GeLoRACallback, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(peft_model(), tmp_path, callback)
    original = trainer.get_train_dataloader

    def with_terminal() -> Any:
        monkeypatch.undo()
        return original()

    trainer.get_train_dataloader = with_terminal
    monkeypatch.setattr(sys, "stdout", Closed())
    trainer.train()
    assert "The plan was not shown: BrokenPipeError" in caplog.text
    assert ranks_by_block(trainer.model) == [2, 6, 5]
    assert saved_plan(tmp_path).ranks == (2, 6, 5)


class Tracker:
    """A report plugin whose server is down, or which sees what is there when it is called."""

    def __init__(self, up: bool) -> None:
        self.up = up
        self.seen: list[list[str]] = []

    @hookimpl(tryfirst=True)
    def write_report(self, output_dir: str) -> None:
        if not self.up:
            raise ConnectionError("the tracker is down")
        self.seen.append(sorted(path.name for path in Path(output_dir).iterdir()))


@pytest.fixture
def trackers() -> Iterator[tuple[Tracker, Tracker]]:
    both = Tracker(up=False), Tracker(up=True)
    for tracker, name in zip(both, ("down", "up"), strict=True):
        plugin_manager().register(tracker, name)
    yield both
    for tracker in both:
        plugin_manager().unregister(tracker)


def test_a_reporter_that_fails_is_a_warning_and_the_files_and_the_others_come_all_the_same(
    tmp_path: Path, trackers: tuple[Tracker, Tracker], caplog: pytest.LogCaptureFixture
) -> None:
    write_reports(RankReport(make_plan()), tmp_path)
    assert [set(names) >= {"plan.json", "report.json", "report.md", "report.html"} for names in trackers[1].seen] == [
        True
    ]
    assert "write_report of the gelora plugin 'down' failed: ConnectionError: the tracker is down" in caplog.text


def test_a_reporter_that_fails_does_not_end_a_training(
    tmp_path: Path, callback: GeLoRACallback, trackers: tuple[Tracker, Tracker]
) -> None:
    trainer = trainer_for(peft_model(), tmp_path, callback)
    trainer.train()
    assert trainer.state.global_step == 3
    assert saved_plan(tmp_path).ranks == (2, 6, 5)
