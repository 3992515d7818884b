"""Work in processes: what one that dies leaves to the others. The work is trivial, the processes are real."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gelora_plugins.side_by_side import side_by_side

ROOT = Path(__file__).parents[3]


def work(item: int) -> int:
    if item < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 0:
        raise KeyError("not caught")
    return 10 * item


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_process_that_is_killed_or_fails_takes_no_other_with_it() -> None:
    found = dict(side_by_side(work, [1, -1, 2, 0, 3], 2))
    assert [found[item] for item in (1, 2, 3)] == [10, 20, 30]
    assert "exit code -9, as one does that the system ends when memory runs out" in str(found[-1])
    assert found[0] == "its process ended with exit code 1."


def test_an_item_is_taken_when_there_is_a_process_for_it() -> None:
    items = itertools.count(1)
    first, _ = next(side_by_side(work, items, 2))
    assert first in (1, 2)
    assert next(items) == 3


def tell_and_sleep(item: int) -> None:
    print(os.getpid(), flush=True)
    time.sleep(600)


def test_no_process_outlives_the_one_that_started_it() -> None:
    script = """if __name__ == "__main__":
        from gelora_plugins.side_by_side import side_by_side
        from tests.unit.compare.test_compare_workers import tell_and_sleep
        list(side_by_side(tell_and_sleep, [1], 1))"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        worker = int(started.stdout.readline())
        assert is_alive(worker)
        started.kill()
    deadline = time.monotonic() + 120
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)


def is_alive(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE
