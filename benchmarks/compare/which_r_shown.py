"""What which_r.py found, as tables and as a picture; and whether what was made anew says what is recorded."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scipy.stats import spearmanr

from gelora_plugins import json_files

HALF, TWICE = "8 at half the rate", "8 at twice the rate"
SHOWN = ("r = 1", "r = 2", "r = 4", "r = 8", "r = 16", "r = 32", "r = 64", HALF, TWICE, "budget", "early", "late")


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """What was found as two Markdown tables."""
    yield "| arm | parameters | loss | less that of 8 | score | less that of 8 | rate |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for arm in sorted(found["arms"], key=lambda arm: (not arm["arm"].startswith("r = "), arm["parameters"])):
        half = f" ± {arm['loss'][1]:.3f}"
        yield (
            f"| {arm['arm']} | {arm['parameters']:,} | {arm['loss'][0]:.3f}{half} | "
            f"{_interval(arm['loss_less_that_of_8'], 3)} | {arm['score'][0]:.1f} ± {arm['score'][1]:.1f} | "
            f"{_interval(arm['score_less_that_of_8'], 1)} | {arm['rate']:g}{' (edge)' if arm['edge'] else ''} |"
        )
    if found["not_run"]:
        yield ""
        yield f"Not run: {', '.join(found['not_run'])}. So the best of the grid is that of the ranks above."
    yield ""
    yield from (f"{room['said']}\n" for room in found["headroom"].values())
    yield "| rule | rank | loss less the best of the grid | less that of 8 | parameters |"
    yield "| --- | --- | --- | --- | --- |"
    arms = {arm["arm"]: arm for arm in found["arms"]}
    for rule in found["rules"]:
        arm = arms.get(rule["judged_as"])
        if arm is None:
            yield f"| {rule['rule']} | {rule['rank']} | not run | | |"
            continue
        yield (
            f"| {rule['rule']} | {rule['rank']} | {_interval(arm['loss_less_the_best'], 3)} | "
            f"{_interval(arm['loss_less_that_of_8'], 3)} | {arm['parameters']:,} |"
        )


def check(made: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(what was found, what is wrong) of a task that was made anew, elsewhere perhaps: no digits are compared.

    Wrong is an arm that the record tells from r = 8 and that comes out on its other side; a difference from r = 8 that
    is further from the recorded one than half of both intervals together; and a headroom whose lower end is above the
    upper end of the recorded one.
    """
    new, old = ({arm["arm"]: arm["loss_less_that_of_8"] for arm in found["arms"]} for found in (made, recorded))
    both = [name for name in new if name in old and None not in (*new[name], *old[name])]
    told = [name for name in both if old[name][1] > 0 or old[name][2] < 0]
    wrong = [
        f"{name}: {_interval(new[name], 3)}, recorded {_interval(old[name], 3)}."
        for name in both
        if (name in told and new[name][0] * old[name][0] <= 0)
        or abs(new[name][0] - old[name][0]) > sum((found[name][2] - found[name][1]) / 2 for found in (new, old))
    ]
    rooms = [found["headroom"].get("loss", {}).get("layout") for found in (made, recorded)]
    if all(rooms) and rooms[0]["gain_interval"][0] > rooms[1]["gain_interval"][1]:
        wrong.append("\n  recorded: ".join(found["headroom"]["loss"]["said"] for found in (made, recorded)))
    signs = sum(new[name][0] * old[name][0] > 0 for name in both)
    order = spearmanr([new[name][0] for name in both], [old[name][0] for name in both]).statistic
    compared = "is within the recorded one" if all(rooms) else "is not compared: it is not recorded, or not made"
    return [
        f"Headroom {compared}.",
        f"{len(both)} differences from r = 8 are recorded, {len(told)} of them told apart from 0. {signs} have their "
        f"sign; the rank correlation of all with the recorded ones is {order:.2f}.",
    ], wrong


def draw(folder: Path) -> None:
    """folder/which_r.png: for each recorded task, the loss less that of r = 8 by rank, beside what the rate does."""
    recorded = [json_files.read_json(path) for path in sorted(folder.glob("*/which_r.json"))]
    figure = Figure(figsize=(5 * len(recorded), 4), layout="constrained")
    for axis, found in zip(figure.subplots(1, len(recorded), squeeze=False)[0], recorded, strict=True):
        arms = {arm["arm"]: arm["loss_less_that_of_8"] for arm in found["arms"] if arm["arm"] in SHOWN}
        names = [name for name in SHOWN if name in arms]
        for place, name in enumerate(names):
            mean, low, high = arms[name]
            error = [[mean - low], [high - mean]] if low is not None else None
            axis.errorbar(mean, place, xerr=error, fmt="o", color="C1" if "rate" in name else "C0", capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=found["task"], xlabel="test loss less that of r = 8 at its rate (95 %)")
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
    figure.savefig(folder / "which_r.png", dpi=120)


def _interval(values: Sequence[float | None], digits: int) -> str:
    mean, low, high = values
    if not mean and not low:
        return "0"
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
