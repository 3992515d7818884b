"""Two processes write one place at once: every file is whole at every moment, and is one of the two."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins import RankPlan
from tests.faults.runs import train, write_often
from tests.plans import make_plan


@pytest.fixture(scope="module")
def context() -> Any:
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.faults.runs"])
    return made


def test_a_reader_never_sees_half_a_plan(tmp_path: Path, context: Any) -> None:
    plans = [make_plan(), make_plan(ranks=(9,) * 6)]
    path = tmp_path / "plan.json"
    plans[0].save(path)
    writers = [context.Process(target=write_often, args=(path, plan.ranks, 300)) for plan in plans]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(plans.index(RankPlan.load(path)))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert set(seen) == {0, 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_two_trainings_in_one_output_directory_both_end(tmp_path: Path, context: Any) -> None:
    policies = ("budget", "gelora")
    runs = [context.Process(target=train, args=(tmp_path, None, policy, False)) for policy in policies]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
        assert run.exitcode == 0, (tmp_path / "log.txt").read_text()
    ranks = [json.loads((tmp_path / f"found-{policy}.json").read_text())["ranks"] for policy in policies]
    assert ranks[0] != ranks[1]
    plan = RankPlan.load(tmp_path / "gelora" / "plan.json")
    assert list(plan.ranks) in ranks
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())
    assert not [path for path in (tmp_path / "gelora").iterdir() if path.name.startswith(".")]
