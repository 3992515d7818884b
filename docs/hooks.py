"""What mkdocs does not do by itself: links that leave docs/, pictures from there, and formulas that need no script."""

import html
import posixpath
import re
import runpy
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
PICTURE = re.compile(r"\((?:\.\./)+(benchmarks/results/[\w-]+\.png)\)")
PART = re.compile(r"^<!-- /?\w+ -->\n", re.MULTILINE)  # of tests.readme.parts
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)


class Integrations(griffe.Extension):
    """integrations/ lies beside gelora_plugins/ in the repository, and in it where it is installed."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Put it there when the package is read."""
        if pkg.path == "gelora_plugins":
            pkg.set_member("integrations", loader.load("integrations"))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Pictures of benchmarks/results come along; other links that leave docs/ become addresses, or plain text."""

    def picture(found: re.Match[str]) -> str:
        uri = f"pictures/{posixpath.basename(found[1])}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / found[1])))
        return f"({posixpath.relpath(uri, folder or '.')})"

    folder = posixpath.dirname(page.file.src_uri)
    markdown = PICTURE.sub(picture, PART.sub("", markdown))
    return str(SETUP["for_elsewhere"](markdown, SETUP["repository"](), posixpath.join("docs", folder), "docs"))


def on_page_content(content: str, **kwargs: Any) -> str:
    """Formulas as MathML, which browsers show without a script and without a network."""

    def formula(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="inline" if found[1] == "span" else "block")

    return FORMULA.sub(formula, content)
