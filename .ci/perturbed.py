"""Looks for tests whose outcome depends on the machine: `make test-perturbed` (about an hour on two cores).

Unit and integration tests run several times, each time with many circumstances changed at once. What fails in a run is
tried again with one circumstance of that run at a time, which says which of them matters. Standard library only.

    python .ci/perturbed.py [--run 2 --run 3] [tests/unit/ranks ...]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from environments import ROOT, VENVS, CannotMakeError, interpreters, python_of
from stages import CORES

LOGS = VENVS / "logs"
TESTS = ["tests/unit", "tests/integration"]
# Folders of the user who runs this, which another user may not write to.
PERSONAL = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_DATASETS_CACHE", "TMPDIR")


@dataclass(frozen=True)
class Run:
    """The circumstances of one run: environment variables, pytest's options, and what else is not as usual."""

    name: str
    variables: dict[str, str]
    options: tuple[str, ...] = ()
    folder: str = "gelora"
    user: str = ""
    load: int = 0


def shuffled(seed: int) -> tuple[str, ...]:
    """Random order, and other global seeds of random, numpy and torch before each test."""
    return ("-p", "randomly", f"--randomly-seed={seed}")


RUNS = (
    Run(
        "plain kernels, one thread, random order, C locale, far time zone, narrow terminal, a space in the path",
        {
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "OMP_NUM_THREADS": "1",
            "LC_ALL": "C",
            "TZ": "Pacific/Kiritimati",
            "COLUMNS": "40",
        },
        shuffled(1),
        folder="x y",
    ),
    Run(
        "AVX2 kernels, two threads, random order, a user who is not root",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "2", "TZ": "America/Adak"},
        shuffled(2),
        user="nobody",
    ),
    Run(
        "this machine's kernels, three threads, random order, Turkish locale, wide terminal",
        {"OMP_NUM_THREADS": "3", "LC_ALL": "tr_TR.UTF-8", "LOCPATH": str(VENVS / "locales"), "COLUMNS": "300"},
        shuffled(3),
    ),
    Run("a load of 8 beside it", {"OMP_NUM_THREADS": "1"}, load=8),
)


def main() -> int:
    """Run all of `RUNS`; print and save what failed in which. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", type=int, help="the number of a run, from 1; all if not given")
    parser.add_argument("tests", nargs="*", default=TESTS)
    chosen = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    lines = [f"{datetime.date.today()}, {_processor()}, {CORES} cores, {_versions()}"]
    bad = False
    for number in chosen.run or range(1, len(RUNS) + 1):
        run = RUNS[number - 1]
        with tempfile.TemporaryDirectory(prefix="perturbed-") as away:
            os.chmod(away, 0o755)
            clone = Path(away, run.folder)
            passed, failed = _run(run, clone, chosen.tests, LOGS / f"perturbed-{number}")
            lines.append(f"{run.name}: {passed} passed, {len(failed)} failed")
            lines += [f"    {test}: {guilty}" for test, guilty in _which(run, clone, failed).items()]
            bad = bad or bool(failed) or not passed
        print("\n".join(lines), flush=True)
        (LOGS / "perturbed.txt").write_text("\n".join(lines) + "\n")
    return int(bad)


def _run(run: Run, clone: Path, tests: list[str], log: Path) -> tuple[int, list[str]]:
    """Run `tests` in `clone`, a fresh one. Returns how many passed, and the names of those that did not."""
    print(f"\n== {run.name}", flush=True)
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **run.variables}
    identity = {}
    if run.user:
        owner = pwd.getpwnam(run.user)
        identity = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        settings = {name: value for name, value in settings.items() if name not in PERSONAL} | {"HOME": str(clone)}
    python = _environment_for(clone, identity)
    if run.user:
        subprocess.run(["chown", "-R", run.user, str(clone)], check=True)
    if "LOCPATH" in settings:
        made = Path(settings["LOCPATH"], settings["LC_ALL"])
        made.parent.mkdir(exist_ok=True)
        language, _, charset = settings["LC_ALL"].partition(".")
        subprocess.run(["localedef", "-i", language, "-f", charset, str(made)], check=True)
    report = clone / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-n", str(CORES), "--dist", "worksteal", f"--junitxml={report}"]
    with _busy(run.load), open(f"{log}.txt", "w") as out:
        subprocess.run(
            [*command, *run.options, *tests], cwd=clone, env=settings, stdout=out, stderr=subprocess.STDOUT, **identity
        )
    if not report.is_file():
        return 0, [f"pytest ended without a report; see {log}.txt"]
    shutil.copy(report, f"{log}.xml")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return len(cases) - len(failed), [_node(case) for case in failed]


def _which(run: Run, clone: Path, tests: list[str]) -> dict[str, str]:
    """For each of `tests` the single circumstances of `run` in which it fails."""
    if not tests:
        return {}
    variables = {key: value for key, value in run.variables.items() if key != "LOCPATH"}
    alone = [Run(f"{key}={value}", {key: value}) for key, value in variables.items()]
    alone += [Run(" ".join(run.options[-1:]), {}, run.options)] if run.options else []
    alone += [Run(f"user {run.user}", {}, user=run.user)] if run.user else []
    alone += [Run(f"a load of {run.load}", {}, load=run.load)] if run.load else []
    fails = {one.name: _run(one, clone, tests, LOGS / "perturbed-alone")[1] for one in alone}
    return {
        test: ", ".join(name for name, failed in fails.items() if test in failed) or "by none of them alone"
        for test in tests
    }


def _environment_for(clone: Path, identity: dict) -> Path:
    """An interpreter that `identity` may run, with the main environment's packages and the package of `clone`."""
    home, packages = clone / ".venvs" / "main", next((python_of("main").parent.parent / "lib").glob("*/site-packages"))
    python = home / "bin" / "python"
    if not python.is_file():
        version = packages.parent.name.removeprefix("python")
        allowed = [one for one in interpreters(version) if _runs(one, identity)]
        if not allowed:
            raise CannotMakeError(f"No Python {version} is here that every user may run, as the main environment's is.")
        # Without pip, and so without the interpreter's own setuptools, which would stand before the environment's.
        subprocess.run([allowed[0], "-m", "venv", "--without-pip", str(home)], check=True)
        (home / "lib" / packages.parent.name / "site-packages" / "shared.pth").write_text(str(packages))
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
        subprocess.run(install, cwd=clone, check=True)
    return python


def _runs(python: str, identity: dict) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([python, "-c", ""], **identity).returncode == 0
    return False


@contextlib.contextmanager
def _busy(count: int):
    """Meanwhile, `count` processes that do nothing but compute.

    Five steps nicer than the tests, which get two fifths of two cores beside eight of them. As equals they would get a
    fifth, and the run would take more than two hours.
    """
    computing = "import os; os.nice(5)\nwhile True: pass"
    busy = [subprocess.Popen([sys.executable, "-c", computing]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _node(case: ElementTree.Element) -> str:
    """pytest's name of a test case of its report."""
    parts = case.get("classname", "").split(".")
    return f"{'/'.join(parts)}.py::{case.get('name')}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _versions() -> str:
    code = "import platform, torch; print('Python', platform.python_version() + ', torch', torch.__version__)"
    return subprocess.run([str(python_of("main")), "-c", code], stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
