"""The parts of the README that are made from the code and from recorded results: `python -m tests.readme_parts`."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from gelora_plugins import GeLoRAConfig

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def options() -> str:
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{field.name}` | `{field.default}` | {field.metadata['help']} |" for field in fields(GeLoRAConfig)]
    return "\n".join(rows)


def estimators() -> str:
    recorded = result("estimators")
    found = {(row["density"], row["dimension"], row["estimator"]): row for row in recorded["rows"]}
    lines = [
        "| density, true dimension | `twonn` mean ± sd | `twonn_mle` mean ± sd | its stated error | its coverage |",
        "| --- | --- | --- | --- | --- |",
    ]
    for density, dimension in dict.fromkeys((row["density"], row["dimension"]) for row in recorded["rows"]):
        fit, mle = (found[density, dimension, name] for name in ("twonn", "twonn_mle"))
        lines.append(
            f"| {density}, {dimension} | {fit['mean']:.2f} ± {fit['sd']:.2f} | {mle['mean']:.2f} ± {mle['sd']:.2f} | "
            f"{mle['stated_se']:.2f} | {mle['coverage']:.0%} |"
        )
    return "\n".join(lines)


def startup() -> str:
    medians = result("startup")["median_seconds"]
    beyond = {name: 1000 * (seconds - medians["python"]) for name, seconds in medians.items()}
    return (
        f"`import gelora_plugins` takes {beyond['import gelora_plugins']:.0f} ms beyond Python's own start and "
        f"`gelora --help` {beyond['gelora --help']:.0f} ms; `import torch` takes {beyond['import torch']:.0f} ms there."
    )


def probe_cost() -> str:
    found = result("probe_cost")
    return (
        f"{found['median_ratio']:.2f} times the bare forward passes of the same backbone on the same batches (median "
        f"of {len(found['seconds']['bare'])} rounds; {found['rows']} rows of {found['tokens']} tokens, SmolLM2-135M)."
    )


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


PARTS = (options, estimators, startup, probe_cost)

if __name__ == "__main__":
    print("\n\n".join(part() for part in PARTS))
