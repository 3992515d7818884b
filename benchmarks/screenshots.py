"""The picture of report.html in the documentation, by a headless Chromium: python benchmarks/screenshots.py"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from machine import RESULTS

from gelora_plugins import RankPlan, RankReport

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 900, 1020  # down to the end of the picture


def main() -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is installed. On Debian: apt install chromium.")
    found = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))["report"]
    trainable = found["trainable_parameters"]
    report = RankReport(RankPlan.from_dict(found["plan"]), trainable["before"], trainable["after"])
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory, "report.html")
        page.write_text(report.to_html(), encoding="utf-8")
        options = ["--headless=new", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # which root cannot have; the page runs no script
        picture = RESULTS / "report.png"
        subprocess.run([browser, *options, f"--screenshot={picture}", page.as_uri()], check=True, timeout=120)
    print(f"-> {picture}")


if __name__ == "__main__":
    main()
