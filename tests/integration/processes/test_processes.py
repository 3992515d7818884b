"""Processes of one group (DDP, gloo): they share the measurement, have one plan, train alike, and end together.

`run_together` makes what torchrun makes: the environment of each process and the store of the group.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins import GeLoRAConfig, RankPlan, select_ranks
from tests.support import groups
from tests.support.forks import run_together, said
from tests.support.training import peft_model, rows, saved_plan


@pytest.fixture(scope="module")
def alone() -> RankPlan:
    return select_ranks(peft_model(), rows(), GeLoRAConfig(policy="budget"), progress=False)


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for rounding, which in a dimension is some 1e-6: it is made of float32 points. Other batches, or points
    in another order, would change it by more than 1e-2."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {"seconds", "rank_changes"}:  # a redraw may be at the edge between two ranks
            assert_same(found[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert found == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(("count", "nodes"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_processes_share_the_work_have_the_plan_of_one_and_train_alike(
    tmp_path: Path, count: int, nodes: int, alone: RankPlan
) -> None:
    assert run_together(tmp_path, count, groups.train, nodes=nodes) == [0] * count, said(tmp_path).read_text()
    found = [json.loads((tmp_path / f"found-{i}.json").read_text()) for i in range(count)]
    assert [one["processes"] for one in found] == [count] * count
    assert all(one == found[0] for one in found)
    assert found[0]["still"] == []
    assert saved_plan(tmp_path).ranks == alone.ranks
    assert_same(saved_plan(tmp_path).to_dict(), alone.to_dict())
    assert set(alone.ranks) != {4}
    assert tuple(found[0]["ranks"]) == alone.ranks[:: len(alone.ranks) // 3]
    assert [said(tmp_path, i).read_text().count("LoRA ranks by GeLoRA") for i in range(count)] == [1, 0, 0][:count]
    logs = [said(tmp_path, i).read_text().count("gelora/mean_rank") for i in range(count)]
    assert logs == [int(i % (count // nodes) == 0) for i in range(count)], "as the Trainer's own log, once on each node"
    measured = [json.loads((tmp_path / f"measured-{i}.json").read_text()) for i in range(count)]
    batches = [16] * 7 + [8]
    assert measured == [batches[i::count] for i in range(count)]


def ends(directory: Path) -> list[str]:
    return [(directory / f"ended-{i}").read_text() for i in range(2)]


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_in_one_process_ends_all_with_its_words(tmp_path: Path, where: int) -> None:
    assert run_together(tmp_path, 2, groups.fail, "error", where) == [0, 0]
    found = ends(tmp_path)
    assert found[where].startswith("ProbeError: The forward pass of LlamaModel with input_ids (16, 12), ")
    assert " failed: ValueError: in the second batch. " in found[where]
    assert found[1 - where] == f"ProbeError: Process {where} of 2 failed while measuring: {found[where]}"


def test_an_error_in_the_collator_of_the_process_that_reads_ends_all_with_its_words(tmp_path: Path) -> None:
    assert run_together(tmp_path, 2, groups.fail, "collator", 0) == [0, 0]
    words = "ProbeError: The data collator failed on rows with the fields document: KeyError: 'a field'. "
    first, second = ends(tmp_path)
    assert first.startswith(words)
    assert second.startswith(f"ProbeError: Process 0 of 2 failed while measuring: {words}")


def test_memory_that_runs_out_in_one_process_halves_the_batches_of_all(tmp_path: Path) -> None:
    assert run_together(tmp_path, 2, groups.fail, "memory", 1) == [0, 0]
    assert ends(tmp_path) == ["trained", "trained"]
    for i in range(2):
        words = said(tmp_path, i).read_text()
        assert [words.count(f"trying again with {size} documents in a batch") for size in (8, 4, 2)] == [1, 1, 0]


@pytest.mark.parametrize(("where", "nodes"), [(0, 1), (1, 1), (1, 2)])
def test_a_process_or_a_node_that_is_killed_while_measuring_ends_the_others(
    tmp_path: Path, where: int, nodes: int
) -> None:
    # One that waits for it in vain waits half an hour; `run_together` does not.
    codes = run_together(tmp_path, 2, groups.fail, "killed", where, nodes=nodes)
    assert codes[where] == -signal.SIGKILL
    assert (tmp_path / f"began-{where}").exists()
    other = tmp_path / f"ended-{1 - where}"
    assert not other.exists() or other.read_text() != "trained"
    assert not (tmp_path / "gelora").exists()
