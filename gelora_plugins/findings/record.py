"""The trainings of a comparison: what tells one from another, and the record of those that are done. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from gelora_plugins.errors import PlanError, WriteError
from gelora_plugins.findings.arms import Recipe
from gelora_plugins.report.versions import versions


@dataclass(frozen=True)
class Run:
    """One training: a recipe, a seed and rates, to choose a rate or for the result. `row` and `method` name it.

    Attributes:
        rate: the learning rate at its highest.
        choosing: train on four fifths of the training rows and score on the fifth that the seed names.
        head_rate: of what is trained beside the adapter; None: `rate`.
    """

    row: str
    method: str
    recipe: Recipe
    seed: int
    rate: float
    choosing: bool
    head_rate: float | None = None

    def __str__(self) -> str:
        return f"{self.row}, {self.method}, seed {self.seed}, {self.rates}"

    @property
    def rates(self) -> str:
        """The rates in words."""
        return f"rate {self.rate:g}" + ("" if self.head_rate is None else f", the head's {self.head_rate:g}")

    def key(self, identity: Mapping[str, Any]) -> str:
        """What the run is told by: everything that its score depends on, and no names."""
        head = [] if self.head_rate is None else [self.head_rate]
        return digest([identity, self.recipe.to_dict(), self.seed, self.rate, self.choosing, *head])[:24]


def made_of(line: Mapping[str, Any]) -> Run:
    """The run of a recorded line."""
    fields = {name: line[name] for name in ("row", "method", "seed", "rate", "choosing")}
    return Run(**fields, recipe=Recipe.from_dict(line["recipe"]), head_rate=line.get("head_rate"))


def digest(value: Any) -> str:
    """SHA-256 over the JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def diverged(line: Mapping[str, Any]) -> bool:
    """Whether the run of this line ended with no finite score or loss, or one not below the constant answer's."""
    return line["score"] is None or excess(line) >= 0


def excess(line: Mapping[str, Any]) -> float:
    """By how much the loss lies above that of the constant answer to the same rows; inf where it is no number.

    -inf for a run that was recorded without the constant answer's loss.
    """
    if line["loss"] is None:
        return math.inf
    constant = line.get("constant_loss")
    return -math.inf if constant is None else line["loss"] - constant


class Workers(Protocol):
    """What trains runs, up to `jobs` at the same time, and gives each with its result, or why there is none."""

    jobs: int

    def train(self, runs: Iterable[Run], jobs: int) -> Iterator[tuple[Run, dict[str, Any] | str]]:
        """A run is taken from `runs` when there is room for it."""


class Record:
    """The runs of one task that are done: a file of JSON lines that only grows. A torn last line is cut off.

    Attributes:
        lines: of all runs in the file, by key.
        failures: why the recipes that failed have no result.

    Raises:
        PlanError: another line is damaged.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = identity
        self.lines = read_lines(path)
        self.failures: dict[Recipe, str] = {}
        _cut_torn_line(path)

    def make(self, runs: Sequence[Run], workers: Workers, bar: Any) -> None:
        """Train those of `runs` that are not done yet, each once, and write each down as it ends.

        A run that fails ends no other, but its recipe is not tried with other seeds and rates. What failed beside
        other runs is tried once more alone: they may have had the memory that it lacked.
        """
        wanted = {run.key(self.identity): run for run in runs if run.recipe not in self.failures}
        missing = [run for key, run in wanted.items() if key not in self.lines]
        if not bar.disable:
            bar.initial += len(wanted) - len(missing)  # the time left is judged by what is trained now
            bar.update(len(wanted) - len(missing))
        failed: dict[Recipe, str] = {}
        installed = versions()
        for jobs in sorted({workers.jobs, 1}, reverse=True):
            failed.clear()
            left = (run for run in missing if run.recipe not in failed)  # looked at when a worker is free
            for made, result in workers.train(left, jobs):
                if isinstance(result, str):
                    failed[made.recipe] = f"seed {made.seed} at the {made.rates} failed: {result}"
                else:
                    self._append({"key": made.key(self.identity), **asdict(made), **result, "versions": installed})
                    bar.update()
            missing = [run for run in missing if run.key(self.identity) not in self.lines]
        self.failures |= failed

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise WriteError(
                f"{self.path} cannot be written: {error.strerror or error}. The runs before are recorded; make room "
                "and run the same command again."
            ) from error
        self.lines[line["key"]] = line


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a runs.jsonl by key; none where there is no file. A last line that is not whole is left out.

    Raises:
        PlanError: another line is no run.
    """
    if not path.is_file():
        return {}
    lines = {}
    for number, text in enumerate(_whole(path.read_bytes()).splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise PlanError(
                f"Line {number} of {path} is not JSON: {error}. Remove the line; its run is made again."
            ) from error
        if not isinstance(line, dict) or not {"key", "score", "loss"} <= line.keys():
            raise PlanError(f"Line {number} of {path} is no run: {text!r:.80}. Remove the line; its run is made again.")
        lines[line["key"]] = line
    return lines


def _whole(text: bytes) -> bytes:
    return text[: text.rfind(b"\n") + 1]


def _cut_torn_line(path: Path) -> None:
    """What is appended next must begin a line."""
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(len(_whole(path.read_bytes())))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in `folder`, which is made; the lock is gone with the process, however that ends.

    Raises:
        WriteError: another process holds it, or the folder cannot be written to.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise WriteError(
            f"Another comparison is at work in {folder}. Wait for its end, or give another name or another output."
        ) from error
    except OSError as error:
        raise WriteError(f"{folder} cannot be written to: {error.strerror or error}. Give another output.") from error
    try:
        yield
    finally:
        lock.release()
