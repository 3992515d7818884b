"""What a user sees, as pictures for the documentation, and whether everybody can read the pages: `make screenshots`.

The terminal after `gelora demo --quick`, report.html, comparison.html, TensorBoard and the notebook, in a headless
Chromium that must be installed. report.html and comparison.html are also looked at by axe-core, light and dark, wide
and on a phone; a violation, or an error in the browser's console, is the exit code 1.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from machine import RESULTS
from nbconvert import HTMLExporter
from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console
from rich.text import Text

from gelora_plugins import RankPlan, RankReport
from gelora_plugins.findings.summary import Comparison

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEIGHTS = {"report": 1020, "comparison": 1360, "notebook": 1200, "terminal": 1000, "tensorboard": 900}
WIDTH, PHONE = 900, 390
BOARD = "127.0.0.1:6016"


def main() -> int:
    installed = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if installed is None:
        raise SystemExit(f"None of {', '.join(BROWSERS)} is installed. On Debian: apt install chromium.")
    found = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))["report"]
    trainable = found["trainable_parameters"]
    report = RankReport(RankPlan.from_dict(found["plan"]), trainable["before"], trainable["after"])
    ours = {"report": report.to_html(), "comparison": Comparison.read(RESULTS / "compare-one-rate").to_html()}
    notebook, _ = HTMLExporter().from_filename(ROOT / "examples" / "quickstart.ipynb")
    others = {"terminal": terminal(), "notebook": notebook}
    wrong: list[str] = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as directory:
        # Root cannot have the sandbox; no script but the pages' own runs in it.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=installed, args=options)
        for name, html in {**ours, **others}.items():
            file = Path(directory, f"{name}.html")
            file.write_text(html, encoding="utf-8")
            page = empty(browser, name, WIDTH)
            page.goto(file.as_uri())
            take(page, name)
            for width in (WIDTH, PHONE) if name in ours else ():
                for scheme in ("light", "dark"):
                    wrong += complaints(browser, file.as_uri(), name, width, scheme)
        with tensorboard(Path(directory)):
            page = empty(browser, "tensorboard", 1200)
            page.goto(f"http://{BOARD}/#timeseries")
            page.get_by_text("gelora/picture").first.wait_for()
            time.sleep(5)  # its cards fade in
            take(page, "tensorboard")
    print("\n".join(wrong) or "axe-core finds no violation, and the console has no error.")
    return bool(wrong)


def empty(browser: Browser, name: str, width: int, scheme: str = "light") -> Page:
    """A page of `browser` for the picture `name`, as wide and in the scheme that is asked for."""
    return browser.new_page(viewport={"width": width, "height": HEIGHTS[name]}, color_scheme=scheme)


def take(page: Page, name: str) -> None:
    """Save what the page shows as the picture `name`."""
    page.screenshot(path=RESULTS / f"{name}.png")
    print(f"-> {RESULTS / name}.png")


def complaints(browser: Browser, address: str, name: str, width: int, scheme: str) -> list[str]:
    """What axe-core, and the console, say of a page, one line each."""
    context = f"{name}.html, {scheme}, {width} pixels wide"
    page = empty(browser, name, width, scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    found = Axe().run(page).response["violations"]
    page.close()
    return [f"{context}: {text}" for text in (*said, *(f"{one['id']}: {one['help']}" for one in found))]


def terminal() -> str:
    """What `gelora demo --quick` writes, as a page."""
    command = [sys.executable, "-m", "gelora_plugins.cli", "demo", "--quick", "--quiet"]
    with tempfile.TemporaryDirectory() as output:
        done = subprocess.run([*command, "--output", output], stdout=subprocess.PIPE, text=True, check=True)
    console = Console(record=True, width=95, file=io.StringIO())
    console.print(Text.from_ansi(f"$ gelora demo --quick\n{done.stdout}"))
    return console.export_html()


@contextmanager
def tensorboard(directory: Path) -> Iterator[None]:
    """TensorBoard on a training of examples/trainer.py, at `BOARD`."""
    example = [sys.executable, str(ROOT / "examples" / "trainer.py"), "--samples", "64", "--steps", "8"]
    settings = {**os.environ, "TENSORBOARD_LOGGING_DIR": str(directory / "boards")}
    options = ["--report-to", "tensorboard", "--output", str(directory / "out")]
    subprocess.run([*example, *options], env=settings, stdout=subprocess.DEVNULL, check=True)
    host, _, port = BOARD.partition(":")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory / "boards"), "--host", host]
    server = subprocess.Popen([*command, "--port", port, "--load_fast=false"])
    try:
        for _ in range(60):
            try:
                urllib.request.urlopen(f"http://{BOARD}", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
