"""The README and docs/: generated parts are as they are made, links lead somewhere, here and elsewhere."""

import json
import re
import runpy
from pathlib import Path

import pytest

import gelora_plugins
from gelora_plugins import GeLoRAConfig
from tests.readme.parts import PAGES, PARTS, PLACE, ROOT, with_parts

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")
for_elsewhere = runpy.run_path(str(ROOT / "setup.py"))["for_elsewhere"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def relative_links(markdown: str) -> list[str]:
    return [target for target in LINK.findall(markdown) if ":" not in target and not target.startswith("#")]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_defaults_in_the_readme_are_the_defaults() -> None:
    shown = re.findall(r"^\| `(\w+)` \| (?:`(\w+)` )?\|", README, re.MULTILINE)
    defaults = {name: "" if value is None else str(value) for name, value in GeLoRAConfig().to_dict().items()}
    assert len(shown) == 5
    assert [(name, default) for name, default in shown if defaults[name] != default] == []


@each_page
def test_parts_made_from_code_and_recorded_results_are_as_they_are_made(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_parts(text) == text, "run python -m tests.readme.parts"


def test_every_part_has_a_place() -> None:
    placed = {place[1] for page in PAGES for place in PLACE.finditer(page.read_text(encoding="utf-8"))}
    assert placed == PARTS.keys()


@each_page
def test_every_file_that_a_page_links_to_is_there(page: Path) -> None:
    targets = relative_links(page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target.split("#")[0]).exists()]
    assert missing == []


def test_links_on_a_package_index_are_whole_addresses() -> None:
    assert relative_links(README)
    moved = for_elsewhere(README, "https://forge.example/gelora")
    assert relative_links(moved) == []
    assert "](https://forge.example/gelora/blob/HEAD/docs/quickstart.md)" in moved
    assert "](https://forge.example/gelora/blob/HEAD/docs/measurements.md#settings)" in moved
    assert "![Intrinsic" in moved
    assert "](https://forge.example/gelora/raw/HEAD/benchmarks/results/ranks.png)" in moved


def test_links_on_a_package_index_are_plain_text_where_the_repository_has_no_address() -> None:
    moved = for_elsewhere(README, None)
    assert relative_links(moved) == []
    assert "![" not in moved
    assert "The quickstart has the whole report." in moved
    assert "](https://arxiv.org/abs/2412.09250)" in moved


def test_pages_of_the_site_keep_links_to_each_other() -> None:
    page = "[a](../faq.md#x) [b](../../examples/trainer.py) [c](#here) ![d](../../benchmarks/results/ranks.png)"
    moved = for_elsewhere(page, "https://forge.example/gelora", "docs/frameworks", "docs")
    assert moved == (
        "[a](../faq.md#x) [b](https://forge.example/gelora/blob/HEAD/examples/trainer.py) [c](#here) "
        "![d](https://forge.example/gelora/raw/HEAD/benchmarks/results/ranks.png)"
    )


def test_every_public_name_can_be_imported() -> None:
    for name in gelora_plugins.__all__:
        if name != "GeLoRAPlugin":  # needs axolotl; its own environments import it
            assert getattr(gelora_plugins, name) is not None


def test_every_public_name_is_in_the_documentation() -> None:
    documented = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: gelora_plugins\.(\w+)$", documented, re.MULTILINE)) == sorted(
        gelora_plugins.__all__
    )


def test_the_mutants_that_no_test_notices_are_counted_and_each_has_its_reason() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "mutants.json").read_text(encoding="utf-8"))
    survivors = [survivor for module in found["modules"].values() for survivor in module["survivors"]]
    assert [survivor for survivor in survivors if not survivor["reason"]] == []
    assert len(survivors) == found["mutants"] - found["killed"]
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"{found['killed']:,} of {found['mutants']:,} changes were noticed" in said
    assert f"Each of the other {len(survivors)} stands" in said
