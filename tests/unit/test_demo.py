"""The model of the demo: unpacked once for all who ask at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from gelora_plugins import demo


def test_the_model_is_unpacked_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    second, asked = threading.Event(), []

    def convert(gguf: Path, directory: Path) -> None:
        asked.append(gguf.name)
        if len(asked) == 2:
            second.set()
        second.wait(0.3)  # for the other one, which is not to come
        directory.mkdir()

    monkeypatch.setattr(demo, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(lambda number: demo.smollm2(), range(2)))
    assert found == {str(tmp_path / "cache" / "gelora" / demo.MODEL.split("/")[1])}
    assert asked == ["model.gguf"]
