"""Who may import whom: rooms downward only, and no circle of modules. Imports for type checkers do not count."""

import ast
import importlib.metadata
import importlib.util
import pydoc
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path
from types import SimpleNamespace

import pytest

import gelora_plugins
from tests.conftest import LONGEST

ROOT = Path(__file__).parents[2]
ROOMS = ("cli", "compare", "dimension", "findings", "methods", "probe", "ranks", "report")


def name_of(path):
    """gelora_plugins/probe/pooling.py is "probe.pooling", integrations/trl.py is "integrations.trl"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "gelora_plugins" else parts).removesuffix(".__init__")


FOLDERS = [ROOT / "gelora_plugins", *(ROOT / "gelora_plugins" / room for room in ROOMS), ROOT / "integrations"]
MODULES = {name_of(path): path for folder in FOLDERS for path in folder.glob("*.py")}
del MODULES["__init__"]  # which reaches for a public name when it is asked for it

# A room imports from those named beside it, and from itself. `base` is what lies in no folder.
ARROWS = {
    "base": "",
    "probe": "base",
    "dimension": "base",
    "ranks": "base probe dimension",
    "methods": "base ranks",
    "report": "base dimension ranks",
    "pipeline": "base probe dimension ranks methods report",
    "findings": "base report",
    "compare": "base probe dimension ranks methods report pipeline findings",
    "integrations": "base probe dimension ranks methods report pipeline",
    "cli": "base probe dimension ranks methods report pipeline findings compare integrations",
}
WHOLE_ARROW = {"pipeline", "sensitivity", "builtin"}  # modules of no folder that see the rooms
HEAVY = {"torch", "transformers", "peft", "trl", "axolotl", "numpy"}


def room(module):
    first = module.partition(".")[0]
    return first if first in ARROWS else "pipeline" if module in WHOLE_ARROW else "base"


def executed(tree):
    """All nodes of a syntax tree but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node = ast.Module(node.orelse, [])
        yield node
        yield from executed(node)


def imported(nodes, module):
    """Dotted names that the import statements among `nodes` of a module of the package may stand for."""
    package = f"gelora_plugins.{module}" if module in ROOMS else f"gelora_plugins.{module}".rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def own(names):
    """The modules of the package among dotted names; a public name of the package stands for its module."""
    for name in names:
        if name.startswith("gelora_plugins."):
            inner = name.removeprefix("gelora_plugins.")
            inner = gelora_plugins._HOME.get(inner, inner)
            yield inner if inner in MODULES else inner.rpartition(".")[0] or inner


def parse(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def upward(tree, module):
    """Imports in `module` of what its room may not see."""
    allowed = {room(module), *ARROWS[room(module)].split()}
    found = dict.fromkeys(own(imported(executed(tree), module)))
    return [name for name in found if name not in MODULES or room(name) not in allowed]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    assert upward(parse(module), module) == []


def circles(imports):
    """The modules that can be reached from themselves."""
    reached = {module: set(names) for module, names in imports.items()}
    for middle in reached:
        for names in reached.values():
            if middle in names:
                names |= reached[middle]
    return sorted(module for module, names in reached.items() if module in names)


def test_no_module_imports_itself_by_way_of_others():
    assert circles({module: set(own(imported(executed(parse(module)), module))) for module in MODULES}) == []


def test_the_search_for_circles_finds_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_every_room_has_an_arrow_and_few_files():
    folders = {path.parent for path in (ROOT / "gelora_plugins").rglob("*.py")} - {ROOT / "gelora_plugins"}
    assert {folder.name for folder in folders} == set(ROOMS)
    for folder in FOLDERS:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 14


def test_no_two_files_of_tests_have_one_name():
    """pytest imports each by its name alone, and one command runs several folders."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "axolotl"]
    assert sorted(names) == sorted(set(names))


READ = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in READ))
def test_no_file_is_too_long_to_read(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) not in ("cli", "integrations")))
def test_the_engine_knows_no_framework(module):
    names = {name.split(".")[0] for name in imported(ast.walk(parse(module)), module)}
    assert not names & {"trl", "axolotl", "integrations"}


def private(tree, module):
    """Names of other modules that begin with an underscore."""
    names = [name.removeprefix("gelora_plugins.") for name in imported(ast.walk(tree), module)]
    return [name for name in names if name.rpartition(".")[0] in MODULES and name.rpartition(".")[2].startswith("_")]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_uses_what_is_private_to_another(module):
    assert private(parse(module), module) == []


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from gelora_plugins.pipeline import measure", "layout", ["pipeline"]),
        ("from gelora_plugins import pipeline", "layout", ["pipeline"]),
        ("from gelora_plugins import measure", "layout", ["pipeline"]),
        ("import gelora_plugins.pipeline", "layout", ["pipeline"]),
        ("from . import pipeline", "layout", ["pipeline"]),
        ("from .plan import RankPlan", "ranks.policies", []),
        ("from ..pipeline import measure", "ranks.plan", ["pipeline"]),
        ("try:\n    from gelora_plugins import cli\nexcept ImportError:\n    pass", "pipeline", ["cli"]),
        ("class A:\n    from gelora_plugins import cli", "pipeline", ["cli"]),
        ("def f():\n    from gelora_plugins import cli", "pipeline", ["cli"]),
        ("from gelora_plugins import no_such_module", "pipeline", ["no_such_module"]),
        ("from gelora_plugins.integrations import trl", "pipeline", ["integrations.trl"]),
        ("if TYPE_CHECKING:\n    x = 1\nelse:\n    from gelora_plugins import cli", "pipeline", ["cli"]),
        ("if TYPE_CHECKING:\n    from gelora_plugins import cli", "pipeline", []),
        ("from gelora_plugins.errors import ProbeError", "layout", []),
        ("from gelora_plugins.probe import pooling", "dimension.profile", ["probe.pooling"]),
        ("from gelora_plugins.dimension.profile import growth", "probe.pooling", ["dimension.profile"]),
        ("from gelora_plugins.findings.stats import holm", "report.rank_report", ["findings.stats"]),
        ("from .transformers import GeLoRACallback", "integrations.trl", []),
        ("from .. import cli", "integrations.trl", ["cli"]),
    ],
)
def test_the_check_of_imports_sees_what_counts(source, module, found):
    assert upward(ast.parse(source), module) == found


def test_the_files_that_are_to_be_tested_first_are_there():
    assert [name for name in LONGEST if not (ROOT / name).exists()] == []


# What an import costs


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_imports_nothing_heavy():
    assert not HEAVY & modules_after("import gelora_plugins; gelora_plugins.GeLoRAConfig; gelora_plugins.hookimpl")


def test_the_check_of_heavy_imports_can_fail():
    assert HEAVY & modules_after("import gelora_plugins, numpy") == {"numpy"}


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "config",
        "dimension.profile",
        "hookspecs",
        "json_files",
        "layout",
        "plugins",
        "ranks.plan",
        "ranks.policies",
        "report.rank_report",
    ],
)
def test_what_reads_saved_records_needs_no_torch(module):
    modules = modules_after(f"import gelora_plugins.{module}")
    assert f"gelora_plugins.{module}" in modules
    assert not HEAVY & modules


def test_every_public_name_exists_where_it_is_said_to_be():
    assert set(gelora_plugins._HOME) == set(gelora_plugins.__all__)
    assert set(gelora_plugins._HOME.values()) <= set(MODULES)


def test_the_version_is_that_of_the_installed_package():
    assert gelora_plugins.__version__ == importlib.metadata.version("gelora")


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'gelora_plugins' has no attribute 'no_such_name'"):
        gelora_plugins.no_such_name  # noqa: B018


@pytest.fixture
def without_frameworks(monkeypatch):
    """As where neither trl nor axolotl is installed, for this package alone: others may bind what is patched."""
    find_spec = gelora_plugins.find_spec
    monkeypatch.setattr(
        gelora_plugins, "find_spec", lambda name: None if name in ("axolotl", "trl") else find_spec(name)
    )
    for name in ("GeLoRAPlugin", "GeLoRASFTTrainer"):
        monkeypatch.delitem(vars(gelora_plugins), name, raising=False)


def test_all_public_names_can_be_looked_at_without_the_frameworks(without_frameworks):
    names = {}
    exec("from gelora_plugins import *", names)
    assert set(gelora_plugins.__all__) <= set(names)
    assert all(hasattr(gelora_plugins, name) for name in gelora_plugins.__all__)
    assert 'GeLoRASFTTrainer needs trl, which is not installed here: pip install "gelora[trl]".' in pydoc.render_doc(
        gelora_plugins, renderer=pydoc.plaintext
    )


@pytest.mark.parametrize(("name", "framework"), [("GeLoRAPlugin", "axolotl"), ("GeLoRASFTTrainer", "trl")])
def test_a_name_whose_framework_is_missing_says_so_when_it_is_used(without_frameworks, name, framework):
    found = getattr(gelora_plugins, name)
    with pytest.raises(ImportError, match=f"^{name} needs {framework}, which is not installed here: pip install"):
        found("model", args=None)
    with pytest.raises(ImportError, match=framework):
        type("Mine", (found,), {})()


def test_a_framework_that_is_broken_is_not_taken_for_missing(monkeypatch):
    monkeypatch.delitem(vars(gelora_plugins), "GeLoRASFTTrainer", raising=False)
    monkeypatch.delitem(sys.modules, "gelora_plugins.integrations.trl", raising=False)
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__spec__=SimpleNamespace()))
    with pytest.raises(ImportError, match="SFTTrainer"):
        gelora_plugins.GeLoRASFTTrainer  # noqa: B018


def test_the_folder_of_adapters_refuses_to_be_imported_under_its_own_name():
    done = subprocess.run([sys.executable, "-c", "import integrations"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: This folder was imported as 'integrations'; expected 'gelora_plugins.inte" in done.stderr
    assert "gelora_plugins.integrations" in modules_after("import gelora_plugins.integrations")


@pytest.mark.parametrize("module", ["config", "errors", "json_files", "mistakes", "text"])
def test_the_lowest_modules_need_the_standard_library_only(module):
    names = imported(ast.walk(parse(module)), module)
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"gelora_plugins"}
