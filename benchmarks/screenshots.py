"""The pictures of report.html and comparison.html in the documentation, by a headless Chromium.

python benchmarks/screenshots.py
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from machine import RESULTS

from gelora_plugins import RankPlan, RankReport
from gelora_plugins.findings.summary import Comparison

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 900
HEIGHTS = {"report": 1020, "comparison": 1360}  # down to the end of the pictures


def main() -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is installed. On Debian: apt install chromium.")
    found = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))["report"]
    trainable = found["trainable_parameters"]
    report = RankReport(RankPlan.from_dict(found["plan"]), trainable["before"], trainable["after"])
    compared = Comparison.read(RESULTS / "compare-one-rate")
    for name, html in {"report": report.to_html(), "comparison": compared.to_html()}.items():
        take(browser, html, RESULTS / f"{name}.png", HEIGHTS[name])


def take(browser: str, html: str, picture: Path, height: int) -> None:
    """Save what `browser` shows of a page."""
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory, "page.html")
        page.write_text(html, encoding="utf-8")
        options = ["--headless=new", "--hide-scrollbars", f"--window-size={WIDTH},{height}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # which root cannot have; no script but the page's own runs in it
        subprocess.run([browser, *options, f"--screenshot={picture}", page.as_uri()], check=True, timeout=120)
    print(f"-> {picture}")


if __name__ == "__main__":
    main()
