"""Names that are anybody's stay names wherever they are shown: terminal, Markdown, picture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.text import Text

from gelora_plugins.findings.summary import Comparison
from gelora_plugins.report.pictures import draw
from gelora_plugins.report.rank_report import RankReport
from gelora_plugins.text import label, markdown, printable
from tests.unit.report.test_report import renamed

TERMINAL = {
    "colour": "a\x1b[31mb",
    "window title": "a\x1b]0;b\x07",
    "link": "a\x1b]8;;http://b\x07c",
    "one byte for the same": "a\x9b31mb",
    "back": "a\bb",
    "from right to left": "a\u202eb",
    "half a surrogate": "a\udcffb",
    "no width": "a\u200bb",
}
MARKDOWN = ["a|b", "<img src=x>", "`a`", "[a](http://b)", "*a*", "._a_.", "~~a~~", "$a$", "a & b", "a\\"]
FORMULA = ["a$b$_^{", "$\\badcommand$", "$$", "a$b", "100 %$"]


@pytest.mark.parametrize("name", TERMINAL)
def test_what_a_terminal_acts_on_is_written_as_its_escape(name: str) -> None:
    shown = printable(TERMINAL[name])
    assert shown.isprintable()
    assert shown.encode("ascii").decode("unicode_escape") == TERMINAL[name]


def test_several_lines_are_one() -> None:
    assert printable("a\r\n\tb\u2028c\x85\xa0d") == "a b c d"


def test_letters_of_any_script_are_left_as_they_are() -> None:
    for text in ("größe", "日本語", "имя", "عربي", "\U0001f600", 'a "b" \\n'):
        assert printable(text) == text


@pytest.mark.parametrize("name", TERMINAL.values(), ids=TERMINAL)
@pytest.mark.parametrize("show", [str, lambda report: report.to_markdown()], ids=["terminal", "markdown"])
def test_a_report_has_nothing_for_the_terminal_to_act_on(name: str, show: Callable[[RankReport], str]) -> None:
    assert [line for line in show(RankReport(renamed(name))).split("\n") if not line.isprintable()] == []


@pytest.mark.parametrize("name", [*MARKDOWN, *TERMINAL.values()])
def test_a_comparison_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(comparison(name, tmp_path).to_markdown())
    assert [tag for tag in ("<img", "<code>", "<a ", "<em>", "<s>") if tag in html] == []
    assert html.count("<tr>") == 4
    assert [line for line in html.split("\n") if not line.isprintable()] == []
    shown = printable(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown}</td>" in html
    assert f"<td>{shown}: uniform</td>" in html
    assert f"<h2>{shown}: accuracy</h2>" in html


@pytest.mark.parametrize("name", FORMULA)
def test_a_picture_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    text = Text(0, 0, label(name))
    assert text._preprocess_math(text.get_text()) == (name, False)
    draw(renamed(name), tmp_path / "ranks.png")
    paths = comparison(name, tmp_path).write(tmp_path / "written")
    assert {path.suffix for path in paths} == {".html", ".json", ".md", ".png"}


def test_the_check_of_pictures_can_fail(tmp_path: Path) -> None:
    figure = Figure()
    figure.suptitle(FORMULA[1])
    with pytest.raises(ValueError, match="badcommand"):
        figure.savefig(tmp_path / "a.png")


def test_a_dollar_sign_begins_no_formula_in_markdown() -> None:
    assert markdown("$a$ costs $5") == r"\$a\$ costs \$5"


def comparison(name: str, directory: Path) -> Comparison:
    """A recorded comparison, where the task, the model and a plan have this name."""
    recorded = Path(__file__).parents[2] / "benchmarks" / "results" / "compare-one-rate" / "sst2_fresh"
    experiment = json.loads((recorded / "experiment.json").read_text())
    experiment["model"] = experiment["task"]["name"] = name
    (row,) = (row for row in experiment["rows"] if not row["name"].startswith("uniform"))
    (method,) = (method for method in row["methods"] if method["name"] == row["name"])
    row["name"] = method["name"] = name
    (directory / "recorded").mkdir()
    (directory / "recorded" / "experiment.json").write_text(json.dumps(experiment))
    shutil.copy(recorded / "runs.jsonl", directory / "recorded")
    return Comparison.read(directory)
