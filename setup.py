"""Only for `long_description`; all else is in pyproject.toml.

In README.md and docs/ links are relative, which serves every place that shows the repository. Elsewhere, on a package
index or the built site, they lead to `Repository` of [project.urls], or are plain text where that is not given.
"""

import posixpath
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def repository() -> str | None:
    """The public address, without a slash at the end, or None."""
    urls: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    return urls["Repository"].rstrip("/") if "Repository" in urls else None


def for_elsewhere(markdown: str, address: str | None, folder: str = "", site: str | None = None) -> str:
    """`markdown` of a page in `folder` of the repository, for readers who do not have the files beside it.

    Links to what is in the folder `site` are kept.
    """

    def moved(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path, hash_, fragment = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if ":" in target or target.startswith("#") or (site is not None and path.startswith(f"{site}/")):
            return link[0]
        if address is None:
            return "" if image else text
        return f"{image}[{text}]({address}/{'raw' if image else 'blob'}/HEAD/{path}{hash_}{fragment})"

    return LINK.sub(moved, markdown)


if __name__ == "__main__":
    from setuptools import setup

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(long_description=for_elsewhere(readme, repository()), long_description_content_type="text/markdown")
