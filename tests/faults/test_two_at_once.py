"""Two processes write one place at once: every file is whole at every moment, and is one of the two."""

import json
import multiprocessing
import time
from pathlib import Path

from gelora_plugins import RankPlan
from tests.faults.runs import train, write_until
from tests.support.forks import HANGS, start, wait
from tests.support.plans import make_plan

READS = 300


def test_a_reader_never_sees_half_a_plan(tmp_path: Path) -> None:
    plans = [make_plan(), make_plan(ranks=(9,) * 6)]
    path = tmp_path / "plan.json"
    plans[0].save(path)
    enough = multiprocessing.get_context("forkserver").Event()
    log = tmp_path.with_suffix(".log")
    writers = [start(write_until, path, plan.ranks, enough, log=log) for plan in plans]
    seen: list[int] = []
    hangs = time.monotonic() + HANGS
    while len(seen) < READS or set(seen) != {0, 1}:
        assert all(writer.is_alive() for writer in writers), log.read_text()
        assert time.monotonic() < hangs
        seen.append(plans.index(RankPlan.load(path)))
    enough.set()
    assert [wait(writer) for writer in writers] == [0, 0], log.read_text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_two_trainings_in_one_output_directory_both_end(tmp_path: Path) -> None:
    policies = ("budget", "gelora")
    log = tmp_path / "log.txt"
    runs = [start(train, tmp_path, None, policy, False, log=log) for policy in policies]
    assert [wait(run) for run in runs] == [0, 0], log.read_text()
    ranks = [json.loads((tmp_path / f"found-{policy}.json").read_text())["ranks"] for policy in policies]
    assert ranks[0] != ranks[1]
    plan = RankPlan.load(tmp_path / "gelora" / "plan.json")
    assert list(plan.ranks) in ranks
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())
    assert not [path for path in (tmp_path / "gelora").iterdir() if path.name.startswith(".")]
