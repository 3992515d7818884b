"""comparison.html: one file that needs no network and no other file; its script only sorts tables. Needs no torch."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gelora_plugins.findings import drawing, headroom, tables
from gelora_plugins.report.versions import versions
from gelora_plugins.report.web import included, template

if TYPE_CHECKING:
    from gelora_plugins.findings.summary import Comparison

NAMED = 2  # differences in the headline


def page(comparison: Comparison, now: datetime | None = None) -> str:
    """The comparison as HTML.

    Args:
        now: when it is written, with a time zone; the moment of the call if not given. A comparison records no date.
    """
    script = hashlib.sha256(included("sort.js").encode()).digest()
    return template("comparison").render(
        headline=headline(comparison),
        facts=_facts(comparison, (now or datetime.now(UTC)).astimezone(UTC)),
        tasks=[_task(comparison, experiment) for experiment in comparison.experiments],
        columns={
            "results": tables.RESULTS,
            "rates": tables.RATES,
            "contrasts": tables.CONTRASTS,
            "headroom": headroom.COLUMNS,
        },
        contrasts=list(tables.contrast_cells(comparison.contrasts)),
        lines=comparison.lines(),
        size=(drawing.WIDTH, drawing.NAMES, *drawing.SCORES, drawing.TOP, drawing.STEP, drawing.CELL),
        script=f"sha256-{base64.b64encode(script).decode()}",
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def headline(comparison: Comparison) -> str:
    """How many differences are told apart, and which; without any, what moving ranks could win on the first task."""
    contrasts = comparison.contrasts
    if not contrasts:
        for found in comparison.headrooms:
            return f"{found.task}: at {found.parameters:,} LoRA parameters {found.verdict}."
        return "Nothing was compared at equal parameters."
    told = [c for c in contrasts if c.verdict in ("better", "worse")]
    equal = sum(c.verdict.startswith("equal") for c in contrasts)
    also = f"; {equal} {'is' if equal == 1 else 'are'} equal" if equal else ""
    of = f"{len(contrasts)} difference{'s' if len(contrasts) > 1 else ''} at equal parameters"
    if not told:
        return f"None of {of} is told apart from 0{also}."
    named = "; ".join(f"{c.ours} is {c.verdict} than {c.theirs} on {c.task}" for c in told[:NAMED])
    return f"{len(told)} of {of} {'is' if len(told) == 1 else 'are'} told apart from 0{also}: {named}" + (
        "." if len(told) <= NAMED else " ..."
    )


def _facts(comparison: Comparison, now: datetime) -> dict[str, str]:
    found = comparison.experiments
    return {
        "Model": ", ".join(dict.fromkeys(experiment["model"] for experiment in found)),
        "Tasks": ", ".join(experiment["task"]["name"] for experiment in found),
        "Seeds": ", ".join(dict.fromkeys(str(experiment["settings"]["seeds"]) for experiment in found)),
        "Written": f"{now:%Y-%m-%d %H:%M} UTC",
    }


def _task(comparison: Comparison, experiment: Any) -> dict[str, Any]:
    """What the page says of one task."""
    name = experiment["task"]["name"]
    results, rates = comparison.of(name), list(tables.rate_cells(comparison.of(name)))
    return {
        "name": name,
        "metric": experiment["task"]["metric"],
        "settings": tables.settings_line(experiment, searched=bool(rates)),
        "results": list(tables.result_cells(results, comparison.contrasts)),
        "rates": rates,
        "scores": drawing.draw_scores(results),
        "ranks": drawing.draw_ranks(results, experiment["blocks"]),
        "headrooms": [(h.row, str(h), list(h.cells())) for h in comparison.headrooms if h.task == name],
    }
