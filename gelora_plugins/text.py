"""Text that others wrote (names of modules, plugins, files, tasks), for where it is shown. Standard library only."""

import html
import re
from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """`text` in one line, for a terminal: white space is one space, and what is not printable its escape, as `\\x1b`.

    That is what moves the cursor, colours, sets titles, links or turns the direction of writing, and half of a pair of
    surrogates, which no file takes.
    """
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def markdown(text: str) -> str:
    """`text` in one line of Markdown that shows it as it is: no table, HTML, link, emphasis or formula of its own."""
    # An underscore between letters is one in CommonMark too.
    return re.sub(r"[\\`*<>\[\]|&$~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML for a notebook, with all names as they are."""

    def cells(kind: str, texts: Iterable[str]) -> str:
        return "".join(f"<{kind}>{html.escape(printable(text))}</{kind.partition(' ')[0]}>" for text in texts)

    head = cells("th scope=col", columns)
    body = "".join(f"<tr>{cells('th scope=row', row[:1])}{cells('td', row[1:])}</tr>" for row in rows)
    return f"<table>{cells('caption', [caption])}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def label(text: str) -> str:
    """`text` in one line of a matplotlib picture, which reads what stands between two `$` as a formula."""
    return printable(text).replace("$", r"\$")
