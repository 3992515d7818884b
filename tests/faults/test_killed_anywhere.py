"""SIGKILL at 20 moments between the first row that is read and the second checkpoint; then the same script again."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.runs import CALLS, STEPS, Moments, last_whole_checkpoint, train
from tests.support.forks import start, wait
from tests.support.training import saved_plan

# Phase -> how many kills. Moments are drawn in as many equal parts of the phase, one in each.
KILLS = {"probe": 5, "apply": 4, "report": 4, "steps": 3, "first checkpoint": 2, "second checkpoint": 2}
CASES = [(phase, part) for phase, parts in KILLS.items() for part in range(parts)]


def run(directory: Path, moments: Moments | None = None) -> int:
    """Train in a new process; its exit code."""
    directory.mkdir(exist_ok=True)
    return wait(start(train, directory, moments, log=directory / "log.txt"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run(directory, Moments()) == 0, (directory / "log.txt").read_text()
    return directory


def found(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "found-budget.json").read_text())


def span(phases: dict[str, list[int]], phase: str) -> tuple[int, int]:
    """First and last moment of a phase, in calls and returns since training began."""
    if phase == "steps":
        return phases["steps"][0], phases["checkpoint"][0]
    if phase in CALLS:
        function, call = CALLS[phase]
        return phases[function][2 * call], phases[function][2 * call + 1]
    return phases[phase][0], phases[phase][-1]


def json_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.json"))


@pytest.mark.parametrize(("phase", "part"), CASES)
def test_the_same_script_finishes_with_the_same_ranks(tmp_path: Path, undisturbed: Path, phase: str, part: int) -> None:
    first, last = span(found(undisturbed)["phases"], phase)
    share = (part + random.Random(f"{phase} {part}").random()) / KILLS[phase]
    directory = tmp_path / "out"
    assert run(directory, Moments((phase, 1 + int(share * (last - first))))) == -signal.SIGKILL
    written = directory / "gelora" / "plan.json"
    assert written.exists() or phase in ("probe", "apply", "report")
    if written.exists():  # whole, or not there
        assert saved_plan(directory).ranks == saved_plan(undisturbed).ranks
    goes_on = last_whole_checkpoint(directory) is not None
    assert goes_on or phase != "second checkpoint"
    assert not goes_on or phase in CALLS

    assert run(directory) == 0, (directory / "log.txt").read_text()
    assert found(directory)["ranks"] == found(undisturbed)["ranks"]
    assert found(directory)["resumed"] is goes_on
    assert found(directory)["measured"] == (0 if goes_on else 1)
    for path in json_files(directory):
        json.loads(path.read_text())
    names = [str(path.relative_to(directory)) for path in json_files(directory)]
    assert names == [str(path.relative_to(undisturbed)) for path in json_files(undisturbed)]
    configs = [
        json.loads((place / f"checkpoint-{STEPS}" / "adapter_config.json").read_text())
        for place in (directory, undisturbed)
    ]
    assert configs[0]["rank_pattern"] == configs[1]["rank_pattern"] != {}


def test_an_undisturbed_run_goes_through_every_phase(undisturbed: Path) -> None:
    phases = found(undisturbed)["phases"]
    spans = [span(phases, phase) for phase in KILLS]
    assert all(first < last for first, last in spans)
    assert spans == sorted(spans)
    assert len(phases["checkpoint"]) == STEPS  # entered and left three times
    assert sum(KILLS.values()) == 20
