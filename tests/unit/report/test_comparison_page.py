"""comparison.html: whole in itself, with the comparison's own numbers, for every reader, whatever things are called."""

import base64
import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gelora_plugins import cli
from gelora_plugins.findings import drawing, page, tables
from gelora_plugins.findings.contrasts import Contrast
from gelora_plugins.findings.headroom import Allocation, Headroom
from gelora_plugins.findings.results import Result, Tried
from gelora_plugins.findings.stats import Difference
from gelora_plugins.findings.summary import Comparison
from gelora_plugins.text import printable
from tests.support.pages import LEADING_AWAY, Page
from tests.unit.report.test_web import HOSTILE, contrast

RECORDS = Path(__file__).parents[3] / "benchmarks" / "results"
RECORDED = [Comparison.read(RECORDS / name) for name in ("compare", "compare-tuned", "compare-drawn")]


def headroom(name: str = "tiny") -> Headroom:
    scores = ((70.0, 71.0), (70.5, 71.1), (70.1, 71.3), (69.9, 70.8), (70.2, None))
    arms = [Allocation(f"random {i}" if i else "uniform", (2, 3), of) for i, of in enumerate(scores)]
    return Headroom(name, name, "accuracy", 100, 1e-3, 0.0, arms[0], tuple(arms[1:]), {})


def named(name: str) -> Comparison:
    """A comparison in which all that others name has this name."""
    (experiment,), (result,) = RECORDED[1].experiments, RECORDED[1].results
    there: Any = json.loads(json.dumps(experiment))
    there["model"] = there["task"]["name"] = name
    there["blocks"] = [name] * len(there["blocks"])
    mine = replace(result, task=name, row=name, method=name, ranks=((8, 7.5, 9),), search=(Tried(1e-3, 0.5, 2, 0),))
    other = replace(mine, method="uniform", scores=tuple(score - 1 for score in mine.scores), mean=mine.mean - 1)
    contrast = Contrast(name, name, name, "uniform", Difference(1.0, (0.5, 1.5), 0.001, 0.8, 5), 0.002, "better")
    return Comparison((there,), (mine, other), (contrast,), headrooms=(headroom(name),))


def empty() -> Comparison:
    """One whose runs are not done."""
    return replace(RECORDED[1], results=(), contrasts=())


COMPARISONS = {"many": RECORDED[0], "tuned": RECORDED[1], "drawn": RECORDED[2], "headroom": named("a"), "none": empty()}
every = pytest.mark.parametrize("comparison", COMPARISONS.values(), ids=COMPARISONS)


@every
def test_it_is_well_formed_and_leads_nowhere(comparison: Comparison) -> None:
    html = comparison.to_html()
    found = Page(html)
    assert found.faults == []
    assert html.startswith("<!DOCTYPE html>\n")
    assert not {"link", "img", "iframe", "object", "base", "form", "a", "image", "use"} & set(found.names())
    assert [(n, a) for n, a, _ in found.elements if LEADING_AWAY & a.keys()] == []
    assert not re.search(r"//|url\(|@import", html)
    assert not re.search(r"\b(nan|inf)\b", " ".join(str(a) for _, a, _ in found.elements))


@every
def test_no_script_runs_but_the_one_that_sorts(comparison: Comparison) -> None:
    found = Page(comparison.to_html())
    (script,) = found.texts("script")
    (policy,) = [a["content"] for _, a, _ in found.elements if a.get("http-equiv")]
    sha = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{sha}'"
    assert not [a for _, a, _ in found.elements if any(name.startswith("on") for name in a)]
    assert not re.search(r"innerHTML|fetch|eval|import|document\.write", script)


@every
def test_everybody_can_read_it(comparison: Comparison) -> None:
    found = Page(comparison.to_html())
    elements = found.elements
    assert elements[0][:2] == ("html", {"lang": "en"})
    assert [found.names().count(name) for name in ("header", "main", "footer", "h1")] == [1, 1, 1, 1]
    levels = [int(name[1]) for name in found.names() if re.fullmatch(r"h\d", name)]
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))
    ids = [a["id"] for _, a, _ in elements if "id" in a]
    assert len(set(ids)) == len(ids)
    labels = [(a["aria-labelledby"] or "").split() for n, a, _ in elements if n == "svg"]
    assert all(len(label) == 2 for label in labels)
    assert {each for label in labels for each in label} == set(ids)
    assert {a["role"] for n, a, _ in elements if n == "svg"} <= {"img"}
    assert {a.get("scope") for n, a, _ in elements if n == "th"} <= {"row", "col"}
    regions = [a for _, a, _ in elements if a.get("role") == "region"]
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions), "it scrolls by keys too"
    assert len(regions) == found.names().count("table") + found.names().count("svg")
    assert found.names().count("table") == found.names().count("caption")


@every
def test_the_numbers_are_those_of_the_comparison(comparison: Comparison) -> None:
    found = Page(comparison.to_html())
    expected = list(tables.contrast_cells(comparison.contrasts))
    for experiment in comparison.experiments:
        results = comparison.of(experiment["task"]["name"])
        expected += [*tables.result_cells(results, comparison.contrasts), *tables.rate_cells(results)]
        expected += [cells for h in comparison.headrooms for cells in h.cells()]
    numbers, names = iter(found.texts("td")), found.texts("th", scope="row")
    assert [
        (name, *(next(numbers) for _ in cells[1:])) for name, cells in zip(names, expected, strict=True)
    ] == expected
    assert next(numbers, None) is None
    assert found.texts("li") == [printable(line) for line in comparison.lines()]


@every
def test_each_training_has_one_dot_and_each_allocation_one_line(comparison: Comparison) -> None:
    found = Page(comparison.to_html())
    trainings = {(r.task, r.parameters, r.scores, r.rate) for r in comparison.results}
    dots = found.attributes("circle", "dot") + found.attributes("circle", "best")
    assert len(dots) == len(trainings)
    blocks = {(r.task, ranks) for r in comparison.results for ranks in r.ranks}
    assert len(found.attributes("rect", "rank")) == sum(len(ranks) for _, ranks in blocks)


def test_every_verdict_stands_beside_its_interval() -> None:
    rows = list(tables.contrast_cells(RECORDED[0].contrasts))
    assert [row[:5] for row in rows if row[0] == "budget - permuted" and row[1] == "sst2"] == [
        ("budget - permuted", "sst2", "not told apart", "+0.849", "+0.31 to +1.39")
    ]
    assert len(rows) == len(RECORDED[0].contrasts)


# The pictures


def result(name: str, mean: float, parameters: int, half: float | None = 1.0, **more: Any) -> Result:
    made = replace(RECORDED[1].results[0], row=name, method=name, scores=(mean - 1, mean + 1), mean=mean)
    return replace(made, parameters=parameters, half_width=half, **more)


def test_dots_are_where_their_scores_are_and_the_front_is_what_nothing_beats() -> None:
    results = [result("b", 80.0, 200), result("a", 70.0, 100), result("c", 75.0, 300), result("d", 90.0, 400)]
    drawn = drawing.draw_scores(results)
    assert [(dot.name, dot.parameters, dot.front) for dot in drawn.dots] == [
        ("a", "100", True),
        ("b", "200", True),
        ("c", "300", False),
        ("d", "400", True),
    ]
    left, right = drawing.SCORES  # of 69 and of 91
    assert [dot.x for dot in drawn.dots] == pytest.approx(
        [left + (right - left) * (mean - 69) / 22 for mean in (70, 80, 75, 90)], abs=0.005
    )  # rounded to hundredths
    assert (drawn.dots[0].low, drawn.dots[-1].high) == (left, right)
    assert drawn.front == " ".join(f"{dot.x},{dot.y}" for dot in drawn.dots if dot.front)
    assert [text for _, text in drawn.ticks] == ["69", "74.5", "80", "85.5", "91"]


def test_of_losses_the_front_goes_down() -> None:
    results = [result(name, mean, cost, higher_is_better=False) for name, mean, cost in (("a", 2.0, 1), ("b", 3.0, 2))]
    assert [dot.front for dot in drawing.draw_scores(results).dots] == [True, False]


def test_one_score_without_an_interval_is_drawn_too() -> None:
    drawn = drawing.draw_scores([result("a", 70.0, 100, None)])
    assert drawn.dots[0].text == "a: 70, 100 parameters"
    assert drawn.dots[0].low == drawn.dots[0].x == drawn.dots[0].high


def test_long_names_are_cut_in_the_picture_and_whole_under_the_pointer() -> None:
    name = "a" * 100
    (dot,) = drawing.draw_scores([result(name, 70.0, 100)]).dots
    assert len(dot.name) == drawing.MOST_LETTERS
    assert dot.text.startswith(f"{name}: 70")


def test_numbers_can_be_read_on_the_darkest_cell_by_day_and_by_night() -> None:
    """WCAG 2.2 asks for 4.5 (1.4.3)."""
    found = Page(RECORDED[0].to_html())
    (style,) = found.texts("style")
    opacity = max(float(cell["fill-opacity"] or "") for cell in found.attributes("rect", "rank"))
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]+)", part)) for part in re.findall(r":root {(.*?)}", style)]
    assert len(schemes) == 2
    for colours in schemes:
        blue, ground = (channels(colours[name]) for name in ("blue", "ground"))
        mixed = (opacity * a + (1 - opacity) * b for a, b in zip(blue, ground, strict=True))
        assert contrast("#" + "".join(f"{round(value):02x}" for value in mixed), colours["text"]) >= 4.5


def channels(colour: str) -> list[int]:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]


def test_ranks_are_drawn_once_and_as_dark_as_they_are_large() -> None:
    results = [result("a", 1.0, 1, ranks=((4, 2, 1), (1, 2, 4))), result("b", 1.0, 1, ranks=((4, 2, 1),))]
    drawn = drawing.draw_ranks(results, ["first", "second", "third"])
    assert [(line.name, [cell.rank for cell in line.cells]) for line in drawn.lines] == [
        ("a", ["4", "2", "1"]),
        ("a", ["1", "2", "4"]),
    ]
    assert [cell.share for cell in drawn.lines[0].cells] == [1, 0.5, 0.25]
    assert drawn.lines[1].cells[2].text == "a, third: rank 4"
    wide = drawing.draw_ranks([result("a", 1.0, 1, ranks=((1,) * 80,))], ["block"] * 80)
    assert wide.width >= wide.lines[0].cells[-1].x + drawing.CELL
    assert [text for _, text in wide.blocks] == [str(block) for block in range(0, 80, 5)]


# Its words


def test_the_headline_is_the_finding() -> None:
    both = named("a")
    (told,) = both.contrasts
    not_told, same = replace(told, verdict="not told apart"), replace(told, verdict="equal within 0.1")

    def headline(*contrasts: Contrast) -> str:
        return page.headline(replace(both, contrasts=contrasts))

    assert headline(told) == (
        "1 of 1 difference at equal parameters is told apart from 0: a is better than uniform on a."
    )
    assert headline(not_told, same) == "None of 2 differences at equal parameters is told apart from 0; 1 is equal."
    assert headline(told, told, told).endswith("a is better than uniform on a; a is better than uniform on a ...")
    assert headline() == f"a: at 100 LoRA parameters {both.headrooms[0].verdict}."
    assert page.headline(empty()) == "Nothing was compared at equal parameters."


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_stay_names(name: str) -> None:
    html, harmless = named(name).to_html(), Page(named("a").to_html())
    found = Page(html)
    assert found.faults == []
    assert found.names() == harmless.names()
    assert [a.keys() for _, a, _ in found.elements] == [a.keys() for _, a, _ in harmless.elements]
    assert found.texts("th", scope="row")[1] == printable(name)
    (style,), (script,) = found.texts("style"), found.texts("script")
    rest = html.replace(style, "").replace(script, "")
    assert [line for line in rest.split("\n") if not line.replace("\N{NO-BREAK SPACE}", "").isprintable()] == []


def test_the_date_is_that_of_writing() -> None:
    found = Page(page.page(RECORDED[1], datetime(2026, 1, 2, 3, 4, tzinfo=UTC)))
    assert dict(zip(found.texts("dt"), found.texts("dd"), strict=True))["Written"] == "2026-01-02 03:04 UTC"


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gelora", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "comparison"
    for name in ("experiment.json", "runs.jsonl"):
        (place / "docstrings").mkdir(parents=True, exist_ok=True)
        shutil.copy(RECORDS / "compare-tuned" / "docstrings" / name, place / "docstrings" / name)
    return place


def test_the_report_of_a_folder_of_a_comparison_is_its_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "report", folder)
    shown = capsys.readouterr().out
    assert RECORDED[1].table("docstrings") in shown
    assert f"-> {folder / 'comparison.html'}" in shown
    html = (folder / "comparison.html").read_text(encoding="utf-8")
    assert Page(html).texts("h1") == [page.headline(RECORDED[1])]
    run(monkeypatch, "report", folder, "--json", "-o", tmp_path / "elsewhere")
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(json.dumps(RECORDED[1].to_dict()))
    assert f"-> {tmp_path / 'elsewhere' / 'comparison.html'}" in printed.err
