"""How far what takes long has come: a bar where somebody looks on, lines at fixed shares in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self

SHARES = 10  # lines in a log


def progress_bar(iterable: Iterable[Any] = (), *, total: int, desc: str, unit: str, shown: bool = True) -> Any:
    """tqdm's bar on a terminal and in a notebook, nothing where it is not `shown`, and elsewhere `Lines`."""
    watched = sys.stderr is not None and sys.stderr.isatty()
    if shown and not watched and "ipykernel" not in sys.modules:
        return Lines(iterable, total, desc)
    from tqdm.auto import tqdm

    return tqdm(iterable, total=total, desc=desc, unit=unit, disable=not shown)


class Lines:
    """What is asked of a bar of tqdm, as lines on standard error: one for every tenth, so that a log stays short.

    Attributes:
        total: may be changed; the tenths are of the new one from then on.
        initial: of a bar of tqdm, which judges the time left by it. Here no time left is said.
    """

    disable = False
    initial = 0

    def __init__(self, iterable: Iterable[Any], total: int, desc: str) -> None:
        self.total = total
        self._iterable = iterable
        self._desc = desc
        self._done = 0
        self._told = (total, 0)
        self._started = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        """`count` more are done."""
        before = self._told[1] if self._told[0] == self.total else self._tenths()
        self._done += count
        self._told = (self.total, self._tenths())
        if self._told[1] > before:
            seconds = time.perf_counter() - self._started
            # A log that is closed or on a full disk ends nothing.
            with contextlib.suppress(OSError, ValueError):
                print(f"{self._desc}: {self._done} of {self.total}, {seconds:.0f} s", file=sys.stderr, flush=True)

    def _tenths(self) -> int:
        return SHARES * self._done // max(self.total, 1)
