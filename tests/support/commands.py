"""Runs of the command line in this process."""

import sys

import pytest

from gelora_plugins import cli

PROSE = [f"word{i % 89} word{i * 7 % 83} word{i * i % 79} word{i * 3 % 11}" for i in range(120)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gelora", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    if caught.value.code:
        raise caught.value


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *arguments)
    assert caught.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("gelora: "))
    return line
