"""The disk is full when a record is written: the old file stays, and the message says which file and what to do."""

import errno
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan, cli, json_files
from gelora_plugins.errors import WriteError
from gelora_plugins.report.rank_report import RankReport
from tests.support.plans import SST2, make_plan, make_profile
from tests.support.training import peft_model, ranks_by_block, saved_plan, trainer_for


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """The kernel refuses to write past `size` bytes of any file, in the middle of the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_a_plan_that_does_not_fit_leaves_the_old_one(tmp_path: Path, size: int) -> None:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    before = path.read_bytes()
    assert len(before) > 1000
    with no_file_longer_than(size), pytest.raises(WriteError) as caught:
        make_plan(ranks=(9,) * 6).save(path)
    assert f"{path} cannot be written: File too large. What was there before is unchanged" in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]
    make_plan(ranks=(9,) * 6).save(path)
    assert RankPlan.load(path).ranks == (9,) * 6


def test_a_directory_that_cannot_be_made_is_the_same_error(tmp_path: Path) -> None:
    (tmp_path / "gelora").write_text("a file")
    with pytest.raises(WriteError, match=r"gelora/plan\.json cannot be written: (File exists|Not a directory)"):
        make_plan().save(tmp_path / "gelora" / "plan.json")


@pytest.mark.parametrize("writes", range(4))
def test_a_report_whose_nth_file_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    RankReport(make_plan()).write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = iter(range(10))
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: full() if next(calls) == writes else fsync(handle))
    with pytest.raises(WriteError, match="cannot be written: No space left on device"):
        RankReport(make_plan(ranks=(9,) * 6)).write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(before)
    changed = [path.name for path in tmp_path.iterdir() if path.read_bytes() != before[path.name]]
    assert set(changed) == {*["plan.json", "report.json", "report.md", "report.html"][:writes]}
    assert RankPlan.load(tmp_path / "plan.json")


def test_the_command_line_says_it_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.json"
    json_files.write_json(profile, make_profile(SST2).to_dict())
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["gelora", "plan", str(profile), "-o", str(tmp_path / "plan.json")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"gelora: {tmp_path / 'plan.json'} cannot be written: No space left on device.")
    assert os.listdir(tmp_path) == ["profile.json"]


# In training the ranks are applied when the report is written.


def test_training_stops_before_the_first_step_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_for(peft_model(), tmp_path, GeLoRACallback()).train()
    before = (tmp_path / "gelora" / "plan.json").read_bytes()
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"plan\.json cannot be written: No space left on device"):
            trainer.train()
    assert trainer.state.global_step == 0
    assert (tmp_path / "gelora" / "plan.json").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / "gelora") if name.startswith(".")]
    ranks = ranks_by_block(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 3
    assert ranks_by_block(trainer.model) == ranks


def test_with_keep_it_trains_with_the_chosen_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = trainer_for(peft_model(), tmp_path / "a", GeLoRACallback(GeLoRAConfig(policy="budget")))
    chosen.train()
    assert set(saved_plan(tmp_path / "a").ranks) != {4}
    callback = GeLoRACallback(GeLoRAConfig(policy="budget", on_failure="keep"))
    trainer = trainer_for(peft_model(), tmp_path / "b", callback)
    monkeypatch.setattr(os, "fsync", full)
    trainer.train()
    assert trainer.state.global_step == 3
    assert ranks_by_block(trainer.model) == ranks_by_block(chosen.model)
    assert "No space left on device" in caplog.text
    assert "training with the ranks of the LoRA configuration" not in caplog.text
