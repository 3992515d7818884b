"""Names that are anybody's stay names wherever they are shown: terminal, Markdown, picture."""

from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.text import Text

from gelora_plugins.compare_report import Comparison, Contrast, Result
from gelora_plugins.compare_stats import paired_difference
from gelora_plugins.report import RankReport, draw
from gelora_plugins.text import label, markdown, printable
from tests.unit.test_report import renamed

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
def test_a_comparison_shows_names_as_they_are(name: str) -> None:
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(comparison(name).to_markdown())
    assert [tag for tag in ("<img", "<code>", "<a ", "<em>", "<s>") if tag in html] == []
    assert html.count("<tr>") == 3
    assert [line for line in html.split("\n") if not line.isprintable()] == []
    shown = printable(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown}: {shown}</td>" in html or f"<td>{shown}</td>" in html
    assert f"<h2>{shown}: accuracy</h2>" in html


@pytest.mark.parametrize("name", FORMULA)
def test_a_picture_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    text = Text(0, 0, label(name))
    assert text._preprocess_math(text.get_text()) == (name, False)
    draw(renamed(name), tmp_path / "ranks.png")
    comparison(name).write(tmp_path)


def test_the_check_of_pictures_can_fail(tmp_path: Path) -> None:
    figure = Figure()
    figure.suptitle(FORMULA[1])
    with pytest.raises(ValueError, match="badcommand"):
        figure.savefig(tmp_path / "a.png")


def test_a_dollar_sign_begins_no_formula_in_markdown() -> None:
    assert markdown("$a$ costs $5") == r"\$a\$ costs \$5"


def comparison(name: str) -> Comparison:
    """Two methods on one task, where the task, the model and a plan have this name."""
    settings = {"seeds": 2, "epochs": 1, "rates": [1e-3], "margin": 0.0}
    task = {"name": name, "metric": "accuracy", "train_rows": 10, "test_rows": 5}
    results = tuple(
        Result(name, name, method, True, 100.0, scores, 81.0, 1.0, 1e-3, False, 1.0, None, ((1.0, 2.0),))
        for method, scores in ((name, (80.0, 82.0)), ("uniform", (79.0, 80.0)))
    )
    difference = paired_difference(results[0].scores, results[1].scores)
    contrasts = (Contrast(name, name, name, "uniform", difference, 0.5, "equal within 3"),)
    return Comparison(({"task": task, "model": name, "settings": settings, "notes": []},), results, contrasts)
