"""The versions that a report and a record of runs name."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("gelora", "torch", "transformers", "peft", "trl", "axolotl")


def versions() -> dict[str, str]:
    """Python, and the packages of this project that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
