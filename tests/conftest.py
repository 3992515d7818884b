"""Read by pytest before any test imports torch or transformers."""

import gc
import os
from collections.abc import Generator
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors threads only wait for each other
for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):  # with these, rich and typer write colours into a pipe
    os.environ.pop(name, None)

# What takes longest, so that no worker of pytest-xdist is left with it when the others have nothing more to do.
LONGEST = (
    "tests/integration/compare/test_compare_control.py",
    "tests/integration/compare/test_compare.py",
    "tests/e2e/",
    "tests/faults/test_killed_anywhere.py",
    "tests/integration/trainer/test_killed.py",
    "tests/integration/processes/test_processes.py",
    "tests/integration/processes/test_sharded.py",
    "tests/integration/methods/",
    "tests/integration/",
)


def pytest_collection_finish() -> None:
    """All is imported. Accelerate looks for garbage twice in every training, for longer than the rest of it takes."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """transformers' own `add_adapter` cannot be tested where it refuses every PEFT there is: 5.24, and PEFT 0.21.2."""
    try:
        return (yield)
    except ValueError as error:
        if "The version of PEFT you are using is not compatible" in str(error):
            pytest.xfail(str(error))
        raise


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """In a worker of pytest-xdist the longest tests come first; alone, tests stay in the order of their files."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if item.nodeid.startswith(name)), 99))


@pytest.fixture(autouse=True)
def torch_seed(request: pytest.FixtureRequest) -> None:
    """pytest-randomly (`-p randomly`) seeds random and numpy before each test; torch, too, is not to matter."""
    seed = request.config.getoption("randomly_seed", None)
    if isinstance(seed, int):
        import torch

        torch.manual_seed(seed)
