"""Processes for tests, forked from a server that has imported what they run: none pays for the imports again.

What they run stands in groups.py beside this and in tests/faults/runs.py. Each has its own memory, environment and exit
code, and may be killed.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

HANGS = 900  # seconds; nothing here takes a tenth of it, and gloo gives up after 1800
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def start(function: Callable[..., None], *arguments: Any, log: Path, **environment: str) -> ForkServerProcess:
    """Run `function` in a process of its own; what it says on stdout and stderr is added to `log`."""
    process = _CONTEXT.Process(target=_run, args=(function, arguments, log, environment))
    process.start()
    return process


def run_script(path: Path, arguments: list[str]) -> None:
    """What `python PATH ARGUMENTS` does, for `start`."""
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def wait(process: ForkServerProcess) -> int:
    """The exit code of a process, once it has ended; -9 where SIGKILL did it.

    Raises:
        TimeoutError: it hangs.
    """
    process.join(HANGS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a process has not ended after {HANGS} s")
    return process.exitcode


def run_together(
    directory: Path, count: int, function: Callable[..., None], *arguments: Any, nodes: int = 1
) -> list[int]:
    """Run `function(directory, *arguments)` in `count` processes of one group, as torchrun does; their exit codes.

    With several `nodes` each of them has as many, which number themselves from 0, as on machines of their own.
    What process i says is in `directory / said-i.txt`. Unlike torchrun this ends no process because another failed.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free
    group = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count // nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    processes = [
        start(
            function, directory, *arguments, log=said(directory, i), RANK=str(i), **_place(i, count // nodes), **group
        )
        for i in range(count)
    ]
    try:
        return [wait(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def _place(index: int, of_node: int) -> dict[str, str]:
    return {"LOCAL_RANK": str(index % of_node), "GROUP_RANK": str(index // of_node)}


def said(directory: Path, index: int = 0) -> Path:
    """Where `run_together` keeps what a process says."""
    return directory / f"said-{index}.txt"


def _run(function: Callable[..., None], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    function(*arguments)
