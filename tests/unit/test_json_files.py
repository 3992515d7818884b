"""How records are written."""

import math
import os
import stat

import pytest

from gelora_plugins import json_files
from gelora_plugins.ranks.plan import RankPlan
from tests.support.plans import make_plan


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    before = path.read_bytes()

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        make_plan(ranks=(9,) * 6).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("value", [math.nan, {"a": [math.inf]}, {"a": object()}])
def test_what_json_cannot_say_is_not_written(tmp_path, value):
    path = tmp_path / "value.json"
    with pytest.raises((ValueError, TypeError)):
        json_files.write_json(path, value)
    assert os.listdir(tmp_path) == []


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    other = make_plan(ranks=(9,) * 6)
    other.save(path)
    assert RankPlan.load(path) == other
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_written_file_has_the_rights_that_the_user_gives_new_files(tmp_path, monkeypatch, mask, mode):
    old, changed = os.umask(mask), []
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", changed.append)  # another thread would make files with the changed one
            make_plan().save(tmp_path / "plan.json")
    finally:
        os.umask(old)
    assert changed == []
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == mode
