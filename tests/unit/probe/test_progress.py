"""Progress in a log: lines at fixed shares, whole, and nothing where none is wanted."""

import io
import sys

import pytest

from gelora_plugins.probe.progress import Lines, progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """Standard error is no terminal, and this is no notebook."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    return capsys


def told(log: pytest.CaptureFixture[str]) -> list[str]:
    """The lines without their seconds."""
    text = log.readouterr().err
    assert "\r" not in text
    return [line.rpartition(",")[0] for line in text.splitlines()]


def test_a_log_has_a_line_for_every_tenth(log: pytest.CaptureFixture[str]) -> None:
    with progress_bar(range(25), total=25, desc="GeLoRA probe", unit="batch") as bar:
        assert list(bar) == list(range(25))
    assert told(log) == [f"GeLoRA probe: {done} of 25" for done in (3, 5, 8, 10, 13, 15, 18, 20, 23, 25)]


def test_few_steps_have_a_line_each(log: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar("abc", total=3, desc="runs", unit="run")) == ["a", "b", "c"]
    assert told(log) == ["runs: 1 of 3", "runs: 2 of 3", "runs: 3 of 3"]


def test_more_work_that_turns_up_moves_the_tenths(log: pytest.CaptureFixture[str]) -> None:
    bar = progress_bar(total=0, desc="runs", unit="run")
    bar.total += 10
    bar.update(9)
    bar.total += 90
    for _ in range(11):
        bar.update()
    assert told(log) == ["runs: 9 of 10", "runs: 10 of 100", "runs: 20 of 100"]


def test_nothing_is_said_where_it_is_not_shown(log: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(5), total=5, desc="runs", unit="run", shown=False)) == list(range(5))
    assert told(log) == []


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_bar(range(5), total=5, desc="runs", unit="run") as bar:
        assert not isinstance(bar, Lines)
        list(bar)
    assert "5/5" in terminal.getvalue()


def test_a_notebook_has_a_bar(log: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", io)
    assert not isinstance(progress_bar(range(5), total=5, desc="runs", unit="run"), Lines)


@pytest.mark.parametrize("gone", ["closed", None])
def test_a_log_that_is_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch, gone: str | None) -> None:
    closed = io.StringIO()
    monkeypatch.setattr(sys, "stderr", closed if gone else None)
    bar = progress_bar(range(5), total=5, desc="runs", unit="run")
    closed.close()
    assert list(bar) == list(range(5))
