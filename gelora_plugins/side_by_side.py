"""Work side by side: each item in a process of its own, so that one that dies takes no other with it. No torch."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], jobs: int, preload: Sequence[str] = ()
) -> Iterator[tuple[Item, Result | str]]:
    """`work(item)` of up to `jobs` items at a time, each given as it ends; of one whose process died, a sentence.

    An item is taken when there is a process for it. What still works when the caller stops is ended.

    Args:
        work: a function that can be pickled, and returns what can be pickled.
        preload: modules that `work` needs. Where there is a fork server (not on Windows) it imports them once, and
            forks each process from itself; it never ran a thread of torch, which a fork of this process may have.
    """
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(list(preload))
    waiting = iter(items)
    running: dict[Any, tuple[Item, Any]] = {}  # by the connection that its result comes through
    try:
        while True:
            for item in islice(waiting, jobs - len(running)):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(work, item, sender), daemon=True)
                process.start()
                sender.close()  # the process has the only one now, so that its death is read as an end
                running[receiver] = (item, process)
            if not running:
                return
            ended: list[Any] = wait(list(running))
            for receiver in ended:
                item, process = running.pop(receiver)
                with receiver:
                    result = _received(receiver, process)
                yield item, result
    finally:
        for _, process in running.values():
            process.terminate()


def _received(receiver: Any, process: Any) -> Any:
    try:
        result = receiver.recv()
    except (EOFError, OSError):  # OSError where it died while it sent
        process.join()
        return (
            f"its process ended with exit code {process.exitcode}"
            + (", as one does that the system ends when memory runs out" if process.exitcode == -9 else "")
            + "."
        )
    process.join()
    return result


def _work(work: Callable[[Any], Any], item: Any, sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(work(item))


def _end_with_parent() -> None:
    """A process that trains is not to outlive the one that started it, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
