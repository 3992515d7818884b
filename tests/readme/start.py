"""What the README's first screen and the quickstart say, from recorded results, for `tests.readme.parts`."""

import json
import statistics
from typing import Any

import typer

from gelora_plugins import GeLoRAConfig, RankPlan, RankReport
from gelora_plugins.cli import app
from gelora_plugins.ranks.verdict import verdict
from gelora_plugins.report.table import plan_table, render
from tests.readme.comparison import DRAWN, RESULTS, TUNED, read

DOCSTRINGS = ("docstrings", "uniform r = 8", "uniform")
SHOWN = 1  # blocks at the top of the README's excerpt


def first_screen() -> str:
    """What it brings, costs and does not bring."""
    plan = _quickstart().plan
    probe, eva = (_recorded(name) for name in ("probe_cost", "against_eva"))
    tried = [c for c in read(DRAWN)["contrasts"] if c["theirs"] == "permuted" and c["ours"] in ("budget", "published")]
    better = sum(c["verdict"].startswith("better") for c in tried)
    tasks = {c["task"].split("_lower")[0] for c in tried}
    return "\n".join(
        [
            f"- **It brings** a rank for every block without a search, and how sure it is. On SmolLM2-135M the "
            f"published rule gives\n  a mean rank of {statistics.fmean(plan.ranks):.2f}, which is "
            f"{plan.num_parameters / plan.num_base_parameters:.0%} of the LoRA parameters of `r={plan.base_rank}`.",
            f"- **It costs** one pass over up to {GeLoRAConfig().probe_samples:,} training documents: "
            f"{probe['median_ratio']:.2f} times their bare forward passes. EVA, PEFT's own\n  way to choose ranks from "
            f"data, took {eva['median_ratio_of_seconds']:.0f} times as long on the same rows.",
            f"- **It does not bring a better score at equal parameters.** In {better or 'none'} of {len(tried)} "
            f"comparisons on {len(tasks)} tasks were the chosen\n  ranks better than the same ranks in random order, "
            "corrected for the number of differences. [All numbers](docs/evidence.md).",
            f"- **The rate, and enough rank, matter more.** Chosen with care, the rate is worth {_tuning():.1f} points "
            f"on one task. There\n  the published rule gives rank 1 everywhere, {_price()} below `r=8`. "
            "[Which r?](docs/evidence.md#which-r)",
        ]
    )


def _tuning() -> float:
    """What the search of rates was worth on docstrings: uniform rank 8, mean score, after and before."""
    before, after = (
        next(r["mean"] for r in read(folder)["results"] if (r["task"], r["row"], r["method"]) == DOCSTRINGS)
        for folder in ("compare", TUNED)
    )
    return float(after - before)


def _price() -> str:
    """What the published rule's ranks cost on docstrings beside rank 8: "3.5 points (0.6 to 6.5)"."""
    arms = json.loads((RESULTS / "which-r" / "docstrings" / "which_r.json").read_text(encoding="utf-8"))["arms"]
    mean, low, high = next(a["score_less_that_of_8"] for a in arms if a["arm"] == "published, floor 1")
    return f"{-mean:.1f} points ({-high:.1f} to {-low:.1f})"


def quickstart() -> str:
    """The report of the README's first example, without most of its blocks."""
    report = _quickstart()
    names = [site.name for site in report.plan.sites]
    hidden = set(names[SHOWN:-1])
    lines = [line.rstrip() for line in render(plan_table(report.plan)).splitlines()]
    kept = [line for line in lines if line.split(maxsplit=1)[:1] != [] and line.split()[0] not in hidden]
    kept.insert(next(i for i, line in enumerate(kept) if line.startswith(names[-1])), "...")
    return _console([verdict(report.plan), *kept, report.lines()[0]])


def quickstart_report() -> str:
    """The same report as a whole."""
    return _console([line.rstrip() for line in str(_quickstart()).splitlines()])


def command_line() -> str:
    """Every command with its arguments and options."""
    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        parts.append(f"### gelora {name}\n\n{_cell(command.help)}\n")
        parts += [f"- `{p.name.upper()}`: {_cell(p.help)}" for p in arguments] + ([""] if arguments else [])
        if options:
            parts += ["| option | default | meaning |", "| --- | --- | --- |"]
            parts += [f"| {_names(p)} | {_default(p)} | {_cell(p.help)} |" for p in options] + [""]
    return "\n".join(parts).rstrip()


def _names(option: Any) -> str:
    return ", ".join(f"`{name}`" for name in option.opts)


def _default(option: Any) -> str:
    nothing = option.default is None or option.default is False or option.default == ""
    return "" if nothing else f"`{option.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").replace("|", "\\|").replace("->", "→").split())


def _quickstart() -> RankReport:
    found = _recorded("quickstart")["report"]
    trainable = found["trainable_parameters"]
    return RankReport(RankPlan.from_dict(found["plan"]), trainable["before"], trainable["after"])


def _console(lines: list[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def _number(count: int) -> str:
    return "none" if count == 0 else str(count)


def _recorded(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found
