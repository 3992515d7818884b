"""A saved tiny model, and trainings that are only said."""

from typing import Any

import pytest

from gelora_plugins.compare.bench import Bench
from gelora_plugins.findings.record import Run
from tests.support.comparing import Say, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say(attempt)` puts it in the place of trainings, and gives the list of those that it is asked for."""

    def say(attempt: Any) -> list[Run]:
        asked: list[Run] = []

        def watched(bench: Bench, made: Run, threads: int | None = None) -> Any:
            asked.append(made)
            return attempt(bench, made)

        monkeypatch.setattr("gelora_plugins.compare.run.attempt", watched)
        return asked

    return say
