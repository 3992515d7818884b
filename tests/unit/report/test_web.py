"""report.html: whole in itself, with the plan's own numbers, for every reader, whatever a stranger named things."""

import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from gelora_plugins.ranks.plan import RankPlan
from gelora_plugins.ranks.verdict import verdict
from gelora_plugins.report import chart, web
from gelora_plugins.report.rank_report import RankReport
from gelora_plugins.report.table import COLUMNS, cells
from gelora_plugins.text import printable
from tests.support.pages import LEADING_AWAY, Page
from tests.support.plans import SST2, make_plan, make_profile, make_sites
from tests.unit.report.test_report import CHANGES, SURE, renamed

ROOT = Path(__file__).parents[3]
PLANS = {
    "sure": SURE,
    "no replicates": make_plan(),
    "a boundary without a dimension": make_plan(dimensions=(None, *SST2[1:])),
    "no dimension anywhere": make_plan(dimensions=(None,) * 7),
    "one rank": make_plan(ranks=(8,) * 6),
    "one block": make_plan(dimensions=(3.0, 4.0), ranks=(2,)),
    "huge": make_plan(dimensions=(1e-300, *SST2[1:-1], 1e308), ranks=(65536, 1, 1, 1, 1, 1), base_rank=65536),
}
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "end of an attribute": "\"'><img src=http://b onerror=alert(1)>",
    "end of the title": "</title></svg></style><b>",
    "template": "{{ 7 * 7 }}{% raw %}",
    "entity": "&lt;&amp;#60;",
    "colour": "a\x1b[31mb",
    "formula": "$a$ $$",
    "turned round": "a\u202eb",
    "from right to left": "שלום",
    "300 letters": "a" * 300,
}


def two_stacks() -> RankPlan:
    profile = make_profile((15.0, 17.0, 16.0), (10.0, 12.0))
    return replace(make_plan(), sites=make_sites(profile), ranks=(3, 1, 3), profile=profile)


def page(plan: RankPlan) -> Page:
    return Page(web.page(RankReport(plan)))


every_plan = pytest.mark.parametrize("plan", [*PLANS.values(), two_stacks()], ids=[*PLANS, "two stacks"])


@every_plan
def test_it_is_well_formed_and_leads_nowhere(plan: RankPlan) -> None:
    html = web.page(RankReport(plan, 10, 20))
    found = Page(html)
    assert found.faults == []
    assert html.startswith("<!DOCTYPE html>\n")
    assert not {"script", "link", "img", "iframe", "object", "base", "form", "a", "image", "use"} & set(found.names())
    leading = [(n, a) for n, a, _ in found.elements if LEADING_AWAY & a.keys() - {"style"}]
    assert leading == []
    assert "//" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "nan" not in " ".join(str(a) for _, a, _ in found.elements)
    assert "inf" not in " ".join(found.texts("svg"))
    ((policy,),) = ([a["content"] for _, a, _ in found.elements if a.get("http-equiv")],)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


@every_plan
def test_everybody_can_read_it(plan: RankPlan) -> None:
    found = page(plan)
    elements = found.elements
    assert elements[0][:2] == ("html", {"lang": "en"})
    assert found.texts("h1") == [printable(verdict(plan))]
    assert [found.names().count(name) for name in ("header", "main", "footer", "title")] == [1, 1, 1, 1 + marks(plan)]
    levels = [int(name[1]) for name in found.names() if re.fullmatch(r"h\d", name)]
    assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))
    ids = [a["id"] for _, a, _ in elements if "id" in a]
    assert len(set(ids)) == len(ids)
    labels = " ".join(a["aria-labelledby"] or "" for _, a, _ in elements if "aria-labelledby" in a)
    assert set(labels.split()) <= set(ids)
    (picture,) = (a for n, a, _ in elements if n == "svg")
    assert picture["role"] == "img"
    assert picture["aria-labelledby"] == "finding what"
    assert found.texts("title", id="finding") == [printable(verdict(plan))]
    assert len(found.texts("desc", id="what")) == len(found.texts("caption")) == 1
    assert [a["scope"] for n, a, _ in elements if n == "th"] == ["col"] * len(COLUMNS) + ["row"] * len(plan.sites)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a, _ in elements]
    assert [a["tabindex"] for _, a, _ in elements if a.get("role") == "region"] == ["0"], "it scrolls by keys too"


def marks(plan: RankPlan) -> int:
    return 1 + len(plan.sites) + sum(estimate.value is not None for estimate in plan.profile.estimates)


@every_plan
def test_the_numbers_are_those_of_the_plan(plan: RankPlan) -> None:
    found = page(plan)
    numbers = iter(found.texts("td"))
    rows = [(name, *(next(numbers) for _ in COLUMNS[1:])) for name in found.texts("th", scope="row")]
    assert rows == cells(plan)
    assert found.texts("li") == RankReport(plan).lines()
    facts = dict(zip(found.texts("dt"), found.texts("dd"), strict=True))
    assert facts["LoRA parameters"].startswith(f"{plan.num_parameters:,}, ")
    assert facts["Data"] == f"{plan.profile.num_documents:,} documents, {plan.profile.num_tokens:,} tokens"
    assert facts["SHA-256 of the token ids"] == plan.profile.data_fingerprint
    assert (facts["r"], facts["policy"]) == (str(plan.base_rank), plan.policy)


def test_bars_are_as_high_as_the_ranks_and_as_strong_as_they_are_sure() -> None:
    bars = page(SURE).attributes("rect", "bar")
    heights = [float(bar["height"] or "") for bar in bars]
    # Places are rounded to hundredths, two of them in a height, which is at least a tenth of the panel's 100 units.
    assert heights == pytest.approx([heights[2] * rank for rank in SURE.ranks], rel=0.01 / 10 * 4)
    assert [float(bar["fill-opacity"] or "") for bar in bars] == pytest.approx([1 - change for change in CHANGES])


def test_dots_are_as_high_as_the_dimensions() -> None:
    found = page(SURE)
    heights = [float(dot["cy"] or "") for dot in found.attributes("circle", "dot")]
    scale = (heights[1] - heights[0]) / (SST2[1] - SST2[0])
    # Rounded to hundredths of a unit: two of them in each difference, and in the scale over 2.2 dimensions.
    assert [y - heights[0] for y in heights] == pytest.approx([(d - SST2[0]) * scale for d in SST2], abs=0.04)
    assert scale < 0, "upward"
    assert "boundary 1: dimension 17.2 [15.5, 18.9]" in found.texts("title")
    assert "model.layers.4: rank 2, may differ 50%" in found.texts("title")


@pytest.mark.parametrize("plan", [SURE, two_stacks(), PLANS["huge"], PLANS["one block"]])
def test_all_of_the_picture_is_in_its_panels(plan: RankPlan) -> None:
    drawn = chart.chart(plan)
    (above, below), (top, bottom) = chart.DIMENSIONS, chart.RANKS
    corners = [tuple(map(float, p.split(","))) for points in (*drawn.lines, *drawn.bands) for p in points.split()]
    corners += [(mark.x, mark.y) for mark in drawn.dimensions]
    assert all(chart.LEFT <= x <= chart.RIGHT and above <= y <= below for x, y in corners)
    assert all(mark.x - mark.reach / 2 >= chart.LEFT and mark.x + mark.reach / 2 <= chart.RIGHT for mark in drawn.ranks)
    assert all(top <= mark.y <= bottom for mark in drawn.ranks)
    assert len(drawn.lines) == len(plan.profile.layout.stacks)


@pytest.mark.parametrize(
    ("low", "high", "least", "ticks"),
    [
        (8.7, 18.3, 0.0, ["8", "10", "12", "14", "16", "18", "20"]),
        (0.0, 8.0, 1.0, ["0", "2", "4", "6", "8"]),
        (0.0, 1.0, 1.0, ["0", "1"]),
        (0.0, 3.0, 1.0, ["0", "1", "2", "3"]),
        (0.0, 128.0, 1.0, ["0", "50", "100", "150"]),
        (3.0, 3.0, 0.0, ["3", "3"]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, least: float, ticks: list[str]) -> None:
    axis = chart._round_axis(low, high, (0, 100), 4 if least else 5, least)
    assert [tick.text for tick in axis.ticks()] == ticks
    assert [axis.ticks()[0].at, axis.ticks()[-1].at] == [100.0, 0.0]


def strange(name: str) -> RankPlan:
    """A plan in which all that others name has this name."""
    plan = renamed(name)
    layout = replace(plan.profile.layout, model_type=name)
    profile = replace(plan.profile, layout=layout, model_name=name, estimator=name, pooling=name, options={name: name})
    return replace(plan, profile=profile, rounding=name)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("unsure", [False, True])
def test_names_stay_names(name: str, unsure: bool) -> None:
    plan = strange(name) if not unsure else replace(strange(name), rank_changes=())
    html = web.page(RankReport(plan))
    found, harmless = Page(html), page(strange("a") if not unsure else replace(strange("a"), rank_changes=()))
    assert found.faults == []
    assert found.names() == harmless.names()
    assert [a.keys() for _, a, _ in found.elements] == [a.keys() for _, a, _ in harmless.elements]
    assert found.texts("th", scope="row")[0] == printable(name)
    assert found.texts("p", class_="kicker") == [f"LoRA ranks by GeLoRA: {printable(name)}"]
    assert [line for line in html.split("\n") if not line.replace("\N{NO-BREAK SPACE}", "").isprintable()] == []


def test_the_date_is_that_of_writing_in_universal_time() -> None:
    now = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    found = Page(web.page(RankReport(SURE), now))
    facts = dict(zip(found.texts("dt"), found.texts("dd"), strict=True))
    assert facts["Written"] == "2025-12-31 23:30 UTC"
    before = datetime.now(UTC).replace(second=0, microsecond=0)
    facts = dict(zip((now_found := page(SURE)).texts("dt"), now_found.texts("dd"), strict=True))
    written = datetime.strptime(facts["Written"], "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC)
    assert before <= written <= datetime.now(UTC)


def test_versions_are_named() -> None:
    (footer,) = page(SURE).texts("footer")
    found = RankReport(SURE).to_dict()["versions"]
    assert f"Written with {', '.join(f'{name} {version}' for name, version in found.items())}." in footer


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2.2 defines it."""
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_black_on_white_has_the_contrast_that_the_standard_gives_it() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21)


def test_letters_have_the_contrast_that_the_standard_asks_for_by_day_and_by_night() -> None:
    (style,) = page(SURE).texts("style")
    schemes = [dict(re.findall(r"--(\w+): (#[0-9a-f]+)", found)) for found in re.findall(r":root {(.*?)}", style)]
    assert len(schemes) == 2
    for colours in schemes:
        # WCAG 2.2: 4.5 for text (1.4.3), 3 for the marks of a picture (1.4.11).
        assert min(contrast(colours[name], colours["ground"]) for name in ("text", "quiet")) >= 4.5
        assert min(contrast(colours[name], colours["ground"]) for name in ("blue", "orange")) >= 3
    assert "@media (prefers-color-scheme: dark)" in style


def test_a_report_is_written_with_its_page(tmp_path: Path) -> None:
    paths = RankReport(SURE).write(tmp_path)
    assert tmp_path / "report.html" in paths
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(html).texts("h1") == [verdict(SURE)]


def test_the_built_package_has_the_template(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in ("gelora_plugins", "integrations", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        copy(ROOT / path, source / path)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    templates = {f"report/templates/{path.name}" for path in (ROOT / "gelora_plugins/report/templates").iterdir()}
    assert "report/templates/report.html.j2" in templates
    assert {f"gelora_plugins/{name}" for name in ("py.typed", *templates)} <= set(names)


def copy(source: Path, target: Path) -> None:
    """What git would have of it: no compiled files."""
    for path in [source] if source.is_file() else source.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            place = target / path.relative_to(source) if source.is_dir() else target
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
