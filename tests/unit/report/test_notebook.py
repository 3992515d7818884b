"""What a notebook and a prompt show of a plan, a profile and a report."""

import builtins
import pickle
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from gelora_plugins.hookspecs import hookimpl
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.ranks.verdict import verdict
from gelora_plugins.report.rank_report import RankReport
from gelora_plugins.report.table import cells
from gelora_plugins.text import label, printable
from tests.support.pages import Page
from tests.support.plans import SST2, make_plan, make_profile
from tests.unit.report.test_report import SURE
from tests.unit.report.test_web import HOSTILE, strange


def shown(thing):
    return Page(thing._repr_html_())


def table(thing):
    """The cells of the table, without its head."""
    found = shown(thing)
    names, numbers = found.texts("th", scope="row"), found.texts("td")
    width = len(numbers) // len(names)
    return [(name, *numbers[i * width : (i + 1) * width]) for i, name in enumerate(names)]


def test_a_plan_is_a_table_of_its_ranks():
    plan = make_plan()
    assert table(plan) == [
        (site.name, str(rank), f"{56 * rank}") for site, rank in zip(plan.sites, plan.ranks, strict=True)
    ]
    assert shown(plan).texts("caption") == [str(plan).splitlines()[0]]
    assert shown(plan).texts("th", scope="col") == ["block", "rank", "parameters"]


def test_a_profile_is_a_table_of_its_dimensions():
    profile = make_profile((None, *SST2[1:]), (3.0, 4.0))
    found = table(profile)
    assert found[:2] == [("0", "encoder.block.0", "-"), ("1", "encoder.block.1", "17.2 [15.5, 18.9]")]
    assert found[6:] == [
        ("6", "-", str(profile.estimates[6])),
        ("7", "decoder.block.0", "3.0 [2.7, 3.3]"),
        ("8", "-", "4.0 [3.6, 4.4]"),
    ]


def test_a_report_is_its_verdict_its_table_and_its_lines():
    report = RankReport(SURE, 10, 20)
    assert table(report) == cells(SURE)
    assert shown(report).texts("caption") == [verdict(SURE)]
    assert shown(report).texts("p") == report.lines()


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_stay_names_in_a_notebook(name):
    plan, harmless = strange(name), strange("a")
    for thing, other in ((plan, harmless), (plan.profile, harmless.profile), (RankReport(plan), RankReport(harmless))):
        assert shown(thing).faults == []
        assert shown(thing).names() == shown(other).names()
        assert printable(name) in " ".join(shown(thing).texts("table"))
        assert repr(thing).isprintable()


def test_a_prompt_gets_one_short_line():
    assert repr(SURE) == "<RankPlan gelora: 6 ranks, 1 to 3; 616 parameters, 2,688 at r = 8>"
    assert repr(SURE.profile) == "<DimensionProfile twonn_mle: 7 boundaries, 15.0 to 19.1; 1,000 documents>"
    nothing = make_profile((None, None))
    assert repr(nothing) == "<DimensionProfile twonn_mle: 2 boundaries; 1,000 documents>"
    assert repr(RankReport(SURE)).startswith("RankReport(plan=<RankPlan gelora: ")


def test_the_picture_of_a_plan_is_a_figure_that_a_notebook_shows():
    figure = SURE.plot()
    assert isinstance(figure, Figure)
    assert figure.get_suptitle() == label(verdict(SURE))
    assert figure.get_supxlabel() == "test: 1,000 documents, mean pooling, twonn_mle; ranks by gelora"
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert pickle.loads(pickle.dumps(figure)).get_suptitle() == figure.get_suptitle()


def test_the_caption_names_the_model_where_its_name_is_known():
    plan = replace(SURE, profile=replace(SURE.profile, model_name="owner/model"))
    assert plan.plot().get_supxlabel().startswith("owner/model: 1,000 documents")


def test_a_plugin_may_draw_another():
    class Another:
        @hookimpl
        def draw_plan(self, plan):
            return f"a drawing of {len(plan.ranks)}"

    plugin_manager().register(plugin := Another())
    try:
        assert SURE.plot() == "a drawing of 6"
    finally:
        plugin_manager().unregister(plugin)
    assert isinstance(SURE.plot(), Figure)


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'^The picture of a plan needs matplotlib: pip install "gelora\[plot\]"\.$'):
        SURE.plot()
