"""What every recorded result says about where it was measured."""

import json
import os
import platform
from pathlib import Path
from typing import Any

from gelora_plugins.report.versions import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor kind, cores that this process may use, and versions; no names of hosts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": platform.machine(), "system": platform.system(), "cores": cores, "versions": versions()}


def record(name: str, result: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json with the machine beside the result."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"-> {path}")
