"""The report: what it says of the ranks, and that names in it stay names."""

import json
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from gelora_plugins import json_files
from gelora_plugins.ranks.plan import RankPlan, Site
from gelora_plugins.report import pictures
from gelora_plugins.report.pictures import draw
from gelora_plugins.report.rank_report import RankReport
from gelora_plugins.report.table import plan_table, render
from tests.support.plans import SST2, make_plan

CHANGES = (0.0, 0.04, 0.05, 0.06, 0.5, 1.0)
SURE = make_plan(replicates=50, rank_changes=CHANGES)


def shown(plan):
    """The table as on a terminal."""
    return render(plan_table(plan))


def cells(plan):
    """The cells of the Markdown table, without its head."""
    table = [line for line in RankReport(plan).to_markdown().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[2:]]


def test_the_table_shows_how_sure_each_rank_is():
    assert [row[4] for row in cells(SURE)] == ["0%", "4%", "5%", "6%", "50%", "100%"]
    assert [row[3] for row in cells(SURE)] == [str(rank) for rank in SURE.ranks]
    assert all(f"{change:.0%}" in shown(SURE) for change in CHANGES)


@pytest.mark.parametrize("columns", ["20", "40", "200"])
def test_names_are_whole_on_a_terminal_of_any_width(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    name = "base_model.model.model.language_model.layers.10"
    assert f"\n{name} " in shown(renamed(name))


def test_names_of_fifteen_letters_fit_80_columns():
    assert max(map(len, shown(renamed("model.layers.10")).splitlines())) <= 80


def test_the_report_says_what_the_column_means_and_how_many_blocks_are_unsure():
    errors = SURE.profile.growth_std_errors()
    lines = RankReport(SURE).lines()
    assert f"is known to a standard error of {min(errors):.2f} to {max(errors):.2f}." in " ".join(lines)
    meaning = next(line for line in lines if line.startswith("May differ: "))
    assert "50 redraws of the measured dimensions, from random halves of the documents" in meaning
    assert meaning.endswith("It is above 5% at 3 of 6 blocks.")


def test_without_replicates_the_column_is_a_dash_and_the_report_says_why():
    plan = make_plan()
    assert {row[4] for row in cells(plan)} == {"-"}
    assert "The estimator twonn_mle gives no standard errors: how sure the ranks are is not known." in (
        RankReport(plan).lines()
    )


def test_standardised_coordinates_are_named():
    profile = replace(SURE.profile, standardise=True)
    assert "pooling mean, coordinates standardised." in str(RankReport(replace(SURE, profile=profile)))
    assert "standardised" not in str(RankReport(SURE))


def test_the_saved_report_holds_the_changes(tmp_path):
    RankReport(SURE).write(tmp_path)
    assert RankPlan.load(tmp_path / "plan.json") == SURE
    assert json.loads((tmp_path / "report.json").read_text())["plan"]["rank_changes"] == list(CHANGES)


def test_numbers_of_a_list_are_written_in_one_line(tmp_path):
    value = {"a": [1, 2.5, -1e-30], "b": [[1, 2], ["[\n 1,\n 2\n]"]], "c": [None, 1], "d": [], "e": [{"x": [1]}]}
    json_files.write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text()
    assert json.loads(text) == value
    assert '"a": [ 1, 2.5, -1e-30 ]' in text
    SURE.save(tmp_path / "plan.json")
    assert len((tmp_path / "plan.json").read_text().splitlines()) < 350  # 7 boundaries of 50 replicates each


@pytest.mark.parametrize(
    "name", ["a|b", "<img src=x>", "`code`", "a & b", "*a*", "[a](http://x)", "a\\|b", "a\n\nb", "._a_.", "~~a~~"]
)
def test_names_stay_names_in_markdown(name):
    plan = renamed(name)
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(RankReport(plan).to_markdown())
    shown = " ".join(name.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown}</td>" in html
    assert html.count("<tr>") == 7
    assert f"<p>Policy {shown}, estimator" in html
    assert [tag for tag in ("<img", "<code>", "<a ", "<em>", "<s>") if tag in html] == []


def renamed(name):
    """A plan whose first block and policy have this name."""
    stack = SURE.profile.layout.stacks[0]
    layout = replace(SURE.profile.layout, stacks=((replace(stack[0], name=name), *stack[1:]),))
    sites = (Site(name, 56), *SURE.sites[1:])
    return replace(SURE, sites=sites, policy=name, profile=replace(SURE.profile, layout=layout))


@pytest.mark.parametrize("name", ["h[red]0", "h:red_heart:0", "h\\[0]"])
def test_a_name_that_looks_like_rich_markup_is_shown_as_it_is(name):
    assert f"\n{name} " in shown(renamed(name))


@pytest.mark.parametrize("plan", [SURE, make_plan(), make_plan(dimensions=(None, *SST2[1:])), renamed("a$b$_^{")])
def test_the_picture_is_drawn_with_and_without_what_is_unsure(plan, tmp_path):
    draw(plan, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_a_surer_rank_has_a_stronger_bar():
    axes = Figure().subplots()
    pictures._draw_ranks(SURE, axes)
    strengths = [bar.get_facecolor()[3] for bar in axes.containers[0]]
    assert strengths == pytest.approx([1 - 0.75 * change for change in CHANGES])
