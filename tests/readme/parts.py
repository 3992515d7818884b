"""The parts of README and docs/ made from code and recorded results: `python -m tests.readme.parts` writes them."""

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from gelora_plugins import GeLoRAConfig
from tests.readme.comparison import (
    choices,
    compared,
    compared_methods,
    confirmation,
    drawn,
    drawn_scores,
    drawn_verdicts,
    exact_match,
    headroom_rates,
    null,
    one_rate,
    readings,
    scores,
    smallest,
    sweep,
    tuned,
    two_way,
    verdicts,
)
from tests.readme.start import command_line, first_screen, quickstart, quickstart_report
from tests.readme.which_r import which_r, which_r_said
from tests.support.families import models_read
from tests.support.kinds import matrix
from tests.support.rows import formats_read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def options() -> str:
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{field.name}` | `{field.default}` | {field.metadata['help']} |" for field in fields(GeLoRAConfig)]
    return "\n".join(rows)


def estimators() -> str:
    recorded = result("estimators")
    lines = [
        "| density, true dimension | estimator | mean ± sd | its stated error | its coverage |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['density']}, {row['dimension']} | `{row['estimator']}` | {row['mean']:.2f} ± {row['sd']:.2f} | "
        f"{row['stated_se']:.2f} | {row['coverage']:.0%} |"
        for row in recorded["rows"]
    ]
    old = [row["coverage_as_if_independent"] for row in recorded["rows"] if "coverage_as_if_independent" in row]
    new = [row["coverage"] for row in recorded["rows"] if "coverage_as_if_independent" in row]
    return "\n".join(lines) + (
        f"\n\nThe interval of `twonn_mle` holds in {min(new):.0%} to {max(new):.0%} of the sets; one that takes the "
        f"ratios for independent, in {min(old):.0%} to {max(old):.0%}."
    )


def growth_errors() -> str:
    lines = [
        "| dimension | estimator | true error of a growth | stated / true (least, most) | as if unrelated / true |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['dimension']} | `{row['estimator']}` | {row['true_se']:.2f} | {row['stated_over_true']:.2f} "
        f"({row['least']:.2f}, {row['most']:.2f}) | {row['unrelated_over_true']:.2f} |"
        for row in result("estimators")["differences"]
    ]
    return "\n".join(lines)


def verdict_rates() -> str:
    names = {"independent": "alike, drawn anew", "shared": "alike, the same documents", "falling": "falling everywhere"}
    rows = result("verdict")["rows"]
    counts = sorted({row["points"] for row in rows})
    lines = [
        f"| data | {' | '.join(f'{count:,} documents' for count in counts)} |",
        "| --- |" + " --- |" * len(counts),
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["points"]: f"{row['differ'] / row['sets']:.1%}" for row in rows if row["case"] == case}
        label = names.get(case, f"one block grows by {case}")
        lines.append(f"| {label} | {' | '.join(found[count] for count in counts)} |")
    return "\n".join([*lines, "", f"{min(row['sets'] for row in rows)} sets or more of each."])


def neighbours() -> str:
    recorded = result("neighbours")
    names = list(recorded["rows"][-1]["over_product"])[1:]  # the first is the product itself
    lines = [f"| points | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for row in recorded["rows"]:
        ratios = [f"{row['over_product'][name]:.2f}" for name in names]
        lines.append(f"| {row['points']:,} | {' | '.join(ratios)} |")
    errors = [row["largest_error"] for row in (*recorded["rows"], *recorded["hard"].values())]
    hard = ", ".join(f"{name} {row['over_product']:.1f}" for name, row in recorded["hard"].items())
    return "\n".join(lines) + (
        f"\n\nThe largest relative error of a distance was {max(errors):.0e}. What float32 cannot "
        f"vouch for costs more: {hard} times the product."
    )


def methods() -> str:
    recorded = result("methods")
    lines = [
        "| method | seconds of a step, LoRA's being 1 | in each round | memory beyond LoRA's |",
        "| --- | --- | --- | --- |",
    ]
    lora = recorded["methods"][0]["runs"]
    for row in recorded["methods"][1:]:
        rounds = ", ".join(f"{a['seconds'] / b['seconds']:.2f}" for a, b in zip(row["runs"], lora, strict=True))
        lines.append(f"| `{row['method']}` | {row['ratio']:.2f} | {rounds} | {row['more_bytes'] / 2**20:+,.0f} MiB |")
    return "\n".join(lines)


def methods_on_smollm2() -> str:
    runs = result("methods_on_smollm2")["runs"]
    frameworks = list(dict.fromkeys(run["framework"] for run in runs))
    found = {(run["method"], run["framework"]): run for run in runs}
    lines = ["| method | LoRA parameters at the end | " + " | ".join(frameworks) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(frameworks))
    for method, options in {run["method"]: run["options"] for run in runs}.items():
        given = " ".join([method, *(f"{name}={value}" for name, value in options.items())])
        both = [found[method, framework] for framework in frameworks]
        parameters = " or ".join(f"{count:,}" for count in dict.fromkeys(run["parameters"] for run in both))
        cells = [f"{run['moved']:.2g}, {run['difference']:.1g}" for run in both]
        lines.append(f"| `{given}` | {parameters} | " + " | ".join(cells) + " |")
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


def probe_memory() -> str:
    found = result("probe_cost")["memory"]
    peaks = {name: [_mib(peak) for peak in sorted(values)] for name, values in found["peak_bytes"].items()}
    return (
        f"The pooled features of that are {_mib(found['pooled_bytes'])}. Peaks above the model, each in a fresh "
        f"process: bare {', '.join(peaks['bare'])}; probe {', '.join(peaks['probe'])}. The probe's median "
        f"differs by {found['beyond_bare_over_pooled']:+.2f} times the pooled features; the rest is malloc's doing."
    )


def wide() -> str:
    found = result("scale_wide")
    return (
        f"{found['boundaries']} boundaries of {found['features']:,} features and {found['documents']:,} documents "
        f"(synthetic, feature_storage `{found['storage']}`): {sum(found['seconds'].values()) / 60:.1f} minutes, peak "
        f"{found['peak_bytes'] / 2**30:.1f} GiB for the whole process."
    )


def scale() -> str:
    found = result("scale")
    errors = found["errors"].values()
    shares = ", ".join(f"{shares['dimensions']:.0e} for {name}" for name, shares in found["large"].items())
    return (
        f"A law fitted on {len(errors) - 1} small random models predicts the cost of the one left out to "
        f"{min(errors):+.0%} to {max(errors):+.0%}. By it, on paper and for this machine, the dimensions of 1024 "
        f"documents of 512 tokens take these shares of the forward passes: {shares}."
    )


def against_eva() -> str:
    found = result("against_eva")
    seconds, peaks = found["median_seconds"], found["median_peak_bytes"]
    return (
        f"{found['rows']} rows of {found['tokens']} tokens, SmolLM2-135M, all linear maps: GeLoRA "
        f"{seconds['gelora']:.0f} s and {_mib(peaks['gelora'])} beyond the model, PEFT's EVA {seconds['eva']:.0f} s "
        f"and {_mib(peaks['eva'])}; EVA takes {found['median_ratio_of_seconds']:.0f} times as long (rounds: "
        f"{len(found['runs']['eva'])})."
    )


def sensitivity() -> str:
    found = result("sensitivity")
    lines = [
        "| setting | growth correlation | `gelora`: mean, range | differ at, by | `budget`: range | differ at, by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in found["outcomes"]:
        name, correlation = outcome["setting"]["name"], outcome["correlation"]
        if outcome["reason"]:
            lines.append(f"| {name} | - | - | - | - | - |")
            continue
        published, budget = (outcome["summary"][policy] for policy in ("gelora", "budget"))
        lines.append(
            f"| {name} | {'-' if correlation is None else f'{correlation:.2f}'} | {published['mean']:.2f}, "
            f"{_range(published)} | {_difference(published)} | {_range(budget)} | {_difference(budget)} |"
        )
    return "\n".join(lines)


def sample_size() -> str:
    found = result("sensitivity")
    errors = sorted(found["errors"])
    halves = [outcome["summary"]["gelora"] for outcome in found["outcomes"] if "half" in outcome["setting"]["name"]]
    differ = sorted(half["blocks_that_differ"] for half in halves)
    return (
        f"With {found['rows']:,} documents the standard error of a growth is {errors[0]:.2f} to {errors[-1]:.2f}, "
        f"{statistics.median(errors):.2f} at the median block, where a rank is a step of 1; with a random half of them "
        f"the published rule gives another rank at {differ[0]} to {differ[-1]} of {len(errors)} blocks."
    )


def _range(summary: dict[str, Any]) -> str:
    return f"{summary['lowest']}-{summary['highest']}"


def _difference(summary: dict[str, Any]) -> str:
    return f"{summary['blocks_that_differ']}, {summary['mean_difference']:.2f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        first_screen,
        quickstart,
        quickstart_report,
        command_line,
        options,
        matrix,
        models_read,
        formats_read,
        estimators,
        growth_errors,
        verdict_rates,
        neighbours,
        methods,
        methods_on_smollm2,
        startup,
        probe_cost,
        probe_memory,
        wide,
        scale,
        against_eva,
        sensitivity,
        sample_size,
        drawn,
        drawn_scores,
        drawn_verdicts,
        exact_match,
        compared,
        compared_methods,
        scores,
        verdicts,
        smallest,
        confirmation,
        readings,
        one_rate,
        choices,
        tuned,
        sweep,
        null,
        two_way,
        headroom_rates,
        which_r,
        which_r_said,
    )
}
PLACE = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", re.DOTALL)


def with_parts(page: str) -> str:
    """`page` with every part between its comments, `<!-- name -->` and `<!-- /name -->`, as it is made now."""
    return PLACE.sub(lambda place: f"<!-- {place[1]} -->\n{PARTS[place[1]]()}\n<!-- /{place[1]} -->", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_parts(path.read_text(encoding="utf-8")), encoding="utf-8")
