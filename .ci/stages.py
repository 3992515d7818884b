"""Runs stages of the tests, all of them, and says at the end what ran: `python3 .ci/stages.py lint unit`.

A stage that fails, or whose environment cannot be made, does not keep the others from running. The exit code is 0 only
if every stage ran and passed. Logs and JUnit XML are in .venvs/logs. Standard library only, as environments.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from environments import LATEST, LOCKS, ROOT, VENVS, CannotMakeError, make, python_of

LOGS = VENVS / "logs"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = ("-m", "pytest", "-n", str(min(CORES, 8)), "--dist")
PYTEST = (*WORKERS, "worksteal")
AXOLOTL = (*WORKERS, "loadscope", "tests/axolotl")  # the tests of a class share a training
# Where the package meets the frameworks: what newer ones can break.
MEETING = [
    f"tests/unit/probe/test_{name}.py" for name in ("find_blocks", "hidden_states", "hidden_state_errors", "no_trace")
] + [
    f"tests/integration/{folder}/test_{name}.py"
    for folder, names in {
        "methods": ("method_routes", "step_methods"),
        "models": ("families", "matrix"),
        "trainer": ("resume", "routes", "trackers", "trainer", "trainer_check"),
        "trl": ("trl", "trl_command", "trl_preferences", "trl_rows"),
    }.items()
    for name in names
]
# name -> (environment, what its Python is given)
STAGES = {
    "lint": ("main", ("-m", "ruff", "check", "."), ("-m", "ruff", "format", "--check", ".")),
    "types": ("main", ("-m", "mypy")),
    "docs": ("main", ("-m", "mkdocs", "build", "--strict", "--quiet")),
    "unit": ("main", (*PYTEST, "tests/unit")),
    "integration": ("main", (*PYTEST, "tests/integration")),
    "faults": ("main", (*PYTEST, "tests/faults")),
    "e2e": ("main", (*PYTEST, "tests/e2e")),
    "pip": ("pip", (*PYTEST, *MEETING)),
    "axolotl-0.19": ("axolotl-0.19", AXOLOTL),
    "axolotl-0.21": ("axolotl-0.21", AXOLOTL),
}
VERSIONS = """
import importlib.metadata as m, platform
def version(name):
    try: return name + " " + m.version(name)
    except m.PackageNotFoundError: return None
names = "torch", "transformers", "peft", "trl", "axolotl", "numpy"
print(", ".join(["Python " + platform.python_version(), *filter(None, map(version, names))]))
"""


@dataclass
class Outcome:
    """What came of a stage: `state` is passed, failed or did not run; tests by their outcome; lines that explain."""

    name: str
    state: str = "did not run"
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    lines: list[str] = field(default_factory=list)


def run(outcome: Outcome) -> None:
    """Run the stage that `outcome` names, and write into it what came of it."""
    name, started = outcome.name, time.monotonic()
    environment, *commands = STAGES[name]
    print(f"\n== {name}", flush=True)
    try:
        make(environment)
        if name.startswith("axolotl"):
            make("main")  # which unpacks SmolLM2: it has gguf
    except CannotMakeError as error:
        outcome.lines.append(str(error))
        print(error, flush=True)
        return
    xml = LOGS / f"{name}.xml"
    xml.unlink(missing_ok=True)
    codes = []
    with open(LOGS / f"{name}.txt", "w") as log:
        for command in commands:
            report = (f"--junitxml={xml}",) if "pytest" in command else ()
            codes.append(_tee([str(python_of(environment)), *command, *report], _settings(name), log))
    outcome.seconds = time.monotonic() - started
    outcome.state = "failed" if any(codes) else "passed"
    if any("pytest" in command for command in commands):
        _count(xml, outcome)


def _settings(name: str) -> dict[str, str]:
    """The environment variables of a stage."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    settings["NO_MKDOCS_2_WARNING"] = "1"  # mkdocs-material 9.7 prints a page about it, which is no warning of ours
    settings.setdefault("OMP_NUM_THREADS", "1")  # a worker for each core
    # Threads that spin while they wait make a machine with other work on it several times slower.
    settings.setdefault("OMP_WAIT_POLICY", "passive")
    if name.startswith("axolotl"):
        tell = [str(python_of("main")), "-c", "from gelora_plugins.demo import smollm2; print(smollm2())"]
        told = subprocess.run(tell, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
        settings["GELORA_TEST_MODEL"] = told.splitlines()[-1]
    return settings


def _tee(command: list[str], settings: dict[str, str], log) -> int:
    """Run `command`; what it prints goes to the terminal and to `log`. Returns its exit code."""
    with subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            for line in process.stdout:
                sys.stdout.write(line)
                sys.stdout.flush()
                log.write(line)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _count(xml: Path, outcome: Outcome) -> None:
    """Count the tests in pytest's report, and name those that failed or were skipped."""
    if not xml.is_file():
        outcome.state = "failed"
        outcome.lines.append("pytest ended without a report")
        return
    for case in ElementTree.parse(xml).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
            outcome.lines.append(f"failed: {name}")
        elif skipped is not None:
            outcome.skipped += 1
            outcome.lines.append(f"skipped: {name}: {skipped.get('message')}")
        else:
            outcome.passed += 1
    if outcome.passed + outcome.failed == 0:
        outcome.state = "failed"
        outcome.lines.append("no test ran")


def summary(outcomes: list[Outcome]) -> str:
    """Stage by stage what ran, with which versions, and where the logs are."""
    lines = ["", f"{'stage':<14} {'result':<12} {'passed':>6} {'failed':>6} {'skipped':>7} {'minutes':>7}"]
    for o in outcomes:
        minutes = f"{int(o.seconds) // 60}:{int(o.seconds) % 60:02}"
        lines.append(f"{o.name:<14} {o.state:<12} {o.passed:>6} {o.failed:>6} {o.skipped:>7} {minutes:>7}")
        lines += [f"    {line}" for line in o.lines]
    lines.append("")
    for environment in dict.fromkeys(STAGES[o.name][0] for o in outcomes if o.state != "did not run"):
        python = str(python_of(environment))
        versions = subprocess.run([python, "-c", VERSIONS], stdout=subprocess.PIPE, text=True).stdout.strip()
        lines.append(f"{environment} ({_locked(environment)}): {versions}")
    took = sum(o.seconds for o in outcomes)
    lines.append(f"{took / 60:.1f} minutes on {CORES} cores; logs and JUnit XML are in {LOGS.relative_to(ROOT)}/")
    missing = [o.name for o in outcomes if o.state == "did not run"]
    if missing:
        lines.append(f"DID NOT RUN: {', '.join(missing)}")
    totals = (sum(getattr(o, kind) for o in outcomes) for kind in ("passed", "failed", "skipped"))
    lines.append("{} passed, {} failed, {} skipped".format(*totals))
    return "\n".join(lines)


def _locked(environment: str) -> str:
    if LATEST:
        return "newest packages"
    first = (LOCKS / f"{environment}.txt").read_text().splitlines()[0]
    return f"locked {first.split()[-1].rstrip('.')}"


def main(names: list[str]) -> int:
    """Run the stages `names`; returns the exit code."""
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        print(f"Unknown stages: {', '.join(unknown) or 'none given'}. There are: {', '.join(STAGES)}.")
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    outcomes = [Outcome(name) for name in names]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for outcome in outcomes:
            run(outcome)
    except KeyboardInterrupt:
        print("\nInterrupted.", flush=True)
    text = summary(outcomes)
    (LOGS / "summary.txt").write_text(text + "\n")
    print(text, flush=True)
    return 0 if all(outcome.state == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
