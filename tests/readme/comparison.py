"""The parts of docs/ that are made from recorded comparisons, for `tests.readme.parts`."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gelora_plugins.findings.stats import mean_interval, paired_difference

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GRID = "uniform r = "
DRAWN = "compare-drawn"
TUNED = "compare-tuned"
FOLDERS = ("compare", DRAWN, "compare-confirm", "compare-readings", "compare-one-rate", "compare-sensitivity")
TRIED_AGAIN = {  # PREREGISTRATION.md: from which seed on the confirmation is judged
    ("sst2", "budget"): 5,
    ("sst2_fresh", "budget"): 0,
    ("sst2_held_out", "budget"): 0,
    ("sst2_held_out", "ranks of sst2"): 0,
}
CHOOSING = ("docstrings", "sst2")
AGAINST = ("uniform", "permuted", "reversed", "eva", "adalora")


def compared() -> str:
    tasks, hours = read("compare")["tasks"], {task: _hours(("compare", task)) for task in _tasks("compare")}
    lines = ["| task | model | score | rows to train, to test | epochs | seeds | hours |", "| --- |" + " --- |" * 6]
    lines += [
        f"| {task['name']} | {_model(task)} | {_score(task)} | {task['train_rows']:,}, {task['test_rows']:,} | "
        f"{task['settings']['epochs']} | {task['settings']['seeds']} | {hours[task['name']]:.1f} |"
        for task in tasks
    ]
    everything = _hours(*((folder, task) for folder in FOLDERS for task in _tasks(folder)))
    return "\n".join(lines) + (
        "\n\nHours are of one core: all trainings of the task, those that choose rates too. "
        f"With all tables of this section it was {everything:.1f} hours."
    )


def drawn() -> str:
    """The comparison in which each seed draws its own rows."""
    hours = {task: _hours((DRAWN, task)) for task in _tasks(DRAWN)}
    lines = ["| task | model | score | each seed draws | to test | epochs | seeds | hours |", "| --- |" + " --- |" * 7]
    lines += [
        f"| {task['name']} | {_model(task)} | {_score(task)} | {task['settings']['rows_per_seed']:,} of "
        f"{task['train_rows']:,} rows | {task['test_rows']:,} | {task['settings']['epochs']} | "
        f"{task['settings']['seeds']} | {hours[task['name']]:.1f} |"
        for task in read(DRAWN)["tasks"]
    ]
    return "\n".join(lines)


def drawn_verdicts() -> str:
    others = ("permuted", "uniform")
    return _differences(
        read(DRAWN),
        {f"{row} - {other}": (row, row, other) for row in ("budget", "published", "completion") for other in others},
    ) + ("\n\n" + _smallest(DRAWN))


def drawn_scores() -> str:
    return _scores(DRAWN)


def exact_match() -> str:
    found = json.loads((RESULTS / "gsm8k_exact_match.json").read_text(encoding="utf-8"))
    said = ", ".join(f"{name}: {right}" for name, right in found["right"].items())
    return f"Right answers of SmolLM2-135M to {found['rows']} questions of GSM8K: {said}."


def scores() -> str:
    return _scores("compare")


def _scores(folder: str) -> str:
    found = read(folder)
    tasks = [task["name"] for task in found["tasks"]]
    at = {(_label(r), r["task"]): r for r in found["results"]}
    labels = list(dict.fromkeys(label for label, _ in at))
    rows = [label.split(":")[0] for label in labels]
    lines = [f"| method | {' | '.join(tasks)} |", "| --- |" + " --- |" * len(tasks)]
    for label in sorted(labels, key=lambda x: (x == "full", x.startswith(GRID), rows.index(x.split(":")[0]))):
        cells = (_mean(at.get((label, task))) for task in tasks)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts() -> str:
    found = read("compare")
    return _differences(
        found, {f"{row} - {other}": (row, row, other) for row in ("budget", "published") for other in AGAINST}
    )


def smallest() -> str:
    return _smallest("compare")


def _smallest(folder: str) -> str:
    contrasts = [c for c in read(folder)["contrasts"] if c["ours"] == "budget" and c["theirs"] == "permuted"]
    said = ", ".join(f"{c['task']} {c['difference']['smallest']:.2g}" for c in contrasts)
    return f"The smallest differences from the permuted control that this many seeds could have shown: {said}."


def confirmation() -> str:
    found = read("compare-confirm")
    at = {(r["task"], r["row"], r["method"]): r["scores"] for r in found["results"]}
    controls = ("permuted", "reversed", "uniform")
    lines = [f"| | {' | '.join(f'plan - {other}' for other in controls)} |", "| --- |" + " --- |" * len(controls)]
    for (task, row), first in TRIED_AGAIN.items():
        ours = at[task, row, row][first:]
        others = (at.get((task, row, other)) for other in controls)
        cells = ["" if theirs is None else _with_p(ours, theirs[first:]) for theirs in others]
        lines.append(f"| {task}, {row}, {len(ours)} new seeds | {' | '.join(cells)} |")
    ranks = {(r["task"], r["row"]): r["ranks"][0] for r in found["results"] if r["method"] == r["row"]}
    said = ", ".join(f"({', '.join(f'{rank:g}' for rank in ranks[place])})" for place in TRIED_AGAIN)
    return "\n".join(lines) + f"\n\nThe ranks of the four: {said}."


def _with_p(ours: list[float], theirs: list[float]) -> str:
    difference = paired_difference(ours, theirs)
    assert difference.interval is not None
    low, high = difference.interval
    return f"{difference.mean:+.2f} ({low:+.2f} to {high:+.2f}), p {difference.p:.2g}"


def readings() -> str:
    found = read("compare-readings")
    names = dict.fromkeys(result["row"] for result in found["results"])
    chosen_by = sorted(((_worth(name), name) for name in ("growth", *names) if name != "ramp"), reverse=True)
    said = ", ".join(f"{name} {worth:+.2f}" for worth, name in chosen_by)
    return _differences(found, {name: (name, name, "permuted") for name in names}, "reading - permuted") + (
        f"\n\nThe mean over {' and '.join(CHOOSING)} of the difference over the standard deviation of uniform, which "
        f"chose: {said}."
    )


def _worth(reading: str) -> float:
    """PREREGISTRATION.md, "Choice". Growth is the row "budget" of the main comparison."""
    folder, row = ("compare", "budget") if reading == "growth" else ("compare-readings", reading)
    at = {(r["task"], r["row"], r["method"]): r["scores"] for r in read(folder)["results"]}
    worths = []
    for task in CHOOSING:
        ours = at[task, row, row]
        theirs = at.get((task, row, "permuted"), ours)  # the same rank everywhere has no other order
        worths.append((statistics.fmean(ours) - statistics.fmean(theirs)) / statistics.stdev(at[task, row, "uniform"]))
    return statistics.fmean(worths)


def one_rate() -> str:
    (task,) = (task["name"] for task in read("compare-one-rate")["tasks"])
    at = {c["theirs"]: c["difference"] for c in read("compare-one-rate")["contrasts"] if c["ours"] == "middle token"}
    intervals = {name: [difference["mean"], *difference["interval"]] for name, difference in at.items()}
    said = " and ".join(
        f"{mean:+.2f} ({low:+.2f} to {high:+.2f}) against {name}" for name, (mean, low, high) in intervals.items()
    )
    (rate,) = {result["rate"] for result in read("compare-one-rate")["results"]}
    return f"Middle token on {task}, all at the rate {rate:g}: {said}, {next(iter(at.values()))['seeds']} seeds."


def tuned() -> str:
    """The comparison whose rates were chosen by the search."""
    found = read(TUNED)
    lines = [
        "| method | score | rate | the next lower | the next higher | seeds diverge at | runs that chose |",
        "| --- |" + " --- |" * 6,
    ]
    for r in found["results"]:
        lower = [a for a in r["around"] if a["rate"] < r["rate"]][-1:]
        higher = [a for a in r["around"] if a["rate"] > r["rate"]][:1]
        beside = (f"{a[0]['rate']:g}: {_at(a[0])}" if a else "" for a in (lower, higher))
        cliff, runs = "" if r["cliff"] is None else f"{r['cliff']:g}", sum(tried["seeds"] for tried in r["search"])
        lines.append(f"| {_label(r)} | {_mean(r)} | {r['rate']:g} | {' | '.join(beside)} | {cliff} | {runs} |")
    said = [line for line in found["lines"] if "The head's rate" in line or " against " in line or " is " in line]
    return "\n".join([*lines, "", *said])


def compared_methods() -> str:
    """Every training method beside LoRA, each at a rate of its own."""
    found = read("compare-methods")
    beside = {c["ours"]: c for c in found["contrasts"] if c["theirs"] == "uniform"}
    lines = [
        "| method | score | less LoRA's | rate | seeds diverge at | runs that chose | a run's seconds |",
        "| --- |" + " --- |" * 6,
    ]
    for r in sorted(found["results"], key=lambda r: (r["method"] != "uniform", r["method"])):
        name, contrast = "**LoRA**" if r["method"] == "uniform" else f"`{r['method']}`", beside.get(r["method"])
        less, cliff = _difference(contrast) if contrast else "", "" if r["cliff"] is None else f"{r['cliff']:g}"
        runs = sum(tried["seeds"] for tried in r["search"])
        lines.append(f"| {name} | {_mean(r)} | {less} | {r['rate']:g} | {cliff} | {runs} | {r['seconds']:.0f} |")
    said = [line for line in found["lines"] if "The head's rate" in line or "times these parameters" in line]
    told = [c for c in beside.values() if c["verdict"] in ("better", "worse")]
    verdict = "; ".join(f"{c['ours']} is {c['verdict']}" for c in told) or "none is told from LoRA"
    return "\n".join([*lines, "", f"After correction for {len(beside)} differences: {verdict}.", "", *said])


def _at(around: Mapping[str, Any]) -> str:
    gone = around["scores"].count(None)
    return f"{gone} of {len(around['scores'])} diverged" if gone else f"{statistics.fmean(around['scores']):.4g}"


def sweep() -> str:
    """The chosen rate beside many."""
    found = json.loads((RESULTS / "compare_sweep.json").read_text(encoding="utf-8"))
    lines = ["| rate | score | loss |", "| --- | --- | --- |"]
    for row in found["rows"]:
        name = f"**{row['rate']:g}**" if row["rate"] == found["chosen"] else f"{row['rate']:g}"
        if row["diverged"]:
            lines.append(f"| {name} | {row['diverged']} of {found['seeds']} seeds diverged | |")
        else:
            mean, half = mean_interval(row["scores"])
            lines.append(f"| {name} | {mean:.2f} ± {half:.2g} | {statistics.fmean(row['losses']):.3f} |")
    return "\n".join(lines) + (
        f"\n\nUniform rank 8, {found['seeds']} seeds, the head's rate {found['head_rate']:g}. The search chose "
        f"{found['chosen']:g}: {found['score']:.2f}, where the best of the sweep has {found['best_score']:.2f}."
    )


def two_way() -> str:
    recorded = json.loads((RESULTS / "two_way.json").read_text())
    lines = [
        "| seeds | whose luck differs | seeds and rows: holds | width | seeds alone: holds | width |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['seeds']} | {row['luck']} | {row['two_way_coverage']:.1%} | {row['two_way_width']:.1f} | "
        f"{row['seeds_coverage']:.1%} | {row['seeds_width']:.1f} |"
        for row in recorded["rows"]
    ]
    return "\n".join(lines)


def headroom_rates() -> str:
    """How often the intervals of random allocations hold, and what they let be said."""
    found = json.loads((RESULTS / "headroom.json").read_text(encoding="utf-8"))
    lines = [
        "| effects of the allocations | allocations, seeds | of the sd | of the mean | of the best | won | nothing |",
        "| --- |" + " --- |" * 6,
    ]
    for row in sorted(found["rows"], key=lambda row: [r["case"] for r in found["rows"]].index(row["case"])):
        cells = (f"{row[name]:.1%}" for name in ("sd", "mean", "gain", "won", "nothing"))
        lines.append(f"| {row['case']} | {row['allocations']}, {row['seeds']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{found['rounds']:,} tasks of each."])


def null() -> str:
    """How often a method is told apart from itself."""
    found = json.loads((RESULTS / "compare_null.json").read_text(encoding="utf-8"))
    lines = ["| a method against | now: better, worse | before: better, worse |", "| --- | --- | --- |"]
    for name in dict.fromkeys(row["against"] for row in found["rows"]):
        at = {row["protocol"]: row for row in found["rows"] if row["against"] == name}
        cells = (f"{at[of]['better']:.1%}, {at[of]['worse']:.1%}" for of in ("now", "before"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choices() -> str:
    found = read("compare-sensitivity")
    (task,) = (task["name"] for task in found["tasks"])
    against = {c["row"]: c for c in found["contrasts"] if c["ours"] == c["row"] and c["theirs"] == "uniform"}
    lines = [f"| way, on {task} | parameters | score | way - uniform |", "| --- |" + " --- |" * 3]
    lines += [
        f"| {r['row']} | {r['parameters']:,.0f} | {_mean(r)} | {_difference(against[r['row']])} |"
        for r in found["results"]
        if r["method"] == r["row"]
    ]
    means = [r["mean"] for r in found["results"] if r["method"] == r["row"]]
    return "\n".join(lines) + f"\n\nThe means of all ways lie between {min(means):.1f} and {max(means):.1f}."


def _differences(found: Mapping[str, Any], rows: Mapping[str, tuple[str, str, str]], title: str = "difference") -> str:
    tasks = [task["name"] for task in found["tasks"]]
    at = {(c["task"], c["row"], c["ours"], c["theirs"]): c for c in found["contrasts"]}
    lines = [f"| {title} | {' | '.join(tasks)} |", "| --- |" + " --- |" * len(tasks)]
    for label, names in rows.items():
        cells = [_difference(at.get((task, *names))) for task in tasks]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(contrast: Mapping[str, Any] | None) -> str:
    if contrast is None:
        return ""
    difference = contrast["difference"]
    if difference["interval"] == [0.0, 0.0]:
        return "the same"
    low, high = difference["interval"]
    shown = f"{difference['mean']:+.2g} ({low:+.2g} to {high:+.2g})"
    return f"**{contrast['verdict']}** {shown}" if contrast["verdict"] in ("better", "worse") else shown


def _mean(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    return f"{result['mean']:.4g} ± {result['half_width']:.2g}" + (" (edge)" if result["rate_at_edge"] else "")


def _label(result: Mapping[str, Any]) -> str:
    if result["row"] == "full" or result["row"].startswith(GRID):
        return str(result["row"])
    return str(result["row"]) if result["method"] == result["row"] else f"{result['row']}: {result['method']}"


def _score(task: Mapping[str, Any]) -> str:
    return "loss, lower is better" if task["metric"] == "loss" else f"{task['metric']}, in hundredths"


def _model(task: Mapping[str, Any]) -> str:
    return "SmolLM2-135M" if task["kind"] == "causal-lm" else "MiniLM-L6"


def _tasks(folder: str) -> list[str]:
    return [task["name"] for task in read(folder)["tasks"]]


def _hours(*parts: tuple[str, str]) -> float:
    """Of all runs of these (folder, task), each counted once."""
    seconds = {}
    for folder, task in parts:
        for line in (RESULTS / folder / task / "runs.jsonl").read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            seconds[run["key"]] = run["seconds"]
    return sum(seconds.values()) / 3600


def read(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / folder / "comparison.json").read_text(encoding="utf-8"))
    return found
