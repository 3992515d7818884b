"""Who may import whom: downward only. Imports inside functions and for type checkers do not count, unless said."""

import ast
import importlib.util
import pydoc
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path
from types import SimpleNamespace

import pytest

import gelora_plugins

ROOT = Path(__file__).parents[2]
ENGINE = {path.stem: path for path in (ROOT / "gelora_plugins").glob("*.py") if path.stem != "__init__"}
ADAPTERS = {f"integrations.{path.stem}": path for path in (ROOT / "integrations").glob("*.py")}
MODULES = ENGINE | ADAPTERS

# A module imports from the layers below its own. The adapters, which import each other, are above all but the last.
LAYERS = [
    {"errors"},
    {"collated", "config", "generators", "mistakes", "records", "text"},
    {"hookspecs", "layout", "neighbours", "pooling", "probe_set", "processes", "rows", "storage"},
    {"builtin", "dimension", "inputs", "plugins", "resampling"},
    {"estimators", "features", "ranks"},
    {"lora_config"},
    {"adapter", "boundaries", "policies", "provenance", "report"},
    {"rehearsal"},
    {"plan_check"},
    {"pipeline"},
    set(ADAPTERS),
    {"compare_methods", "compare_stats", "compare_tasks", "compare_workers"},
    {"compare_runs"},
    {"compare_bench", "compare_pictures", "compare_results"},
    {"compare_report"},
    {"compare_training"},
    {"cli", "compare", "demo", "export", "sensitivity"},
]
COMMANDS = LAYERS[-1]
HEAVY = {"torch", "transformers", "peft", "trl", "axolotl", "numpy"}


def layer(module):
    return next(i for i, modules in enumerate(LAYERS) if module in modules)


def run_at_import(tree):
    """The nodes of a syntax tree that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node = ast.Module(node.orelse, [])
        yield node
        yield from run_at_import(node)


def imported(nodes, module):
    """Dotted names that the import statements among `nodes` of a module of the package may stand for."""
    package = f"gelora_plugins.{module}".rpartition(".")[0]
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


def upward(source, module):
    """Imports in the source of `module` that do not go downward."""
    below = set().union(*LAYERS[: layer(module)])
    friends = set(ADAPTERS) if module in ADAPTERS else set()
    return [name for name in own(imported(run_at_import(source), module)) if name not in below | friends]


def test_every_module_has_its_place():
    assert set(MODULES) <= set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downward(module):
    assert upward(parse(module), module) == []


@pytest.mark.parametrize("module", sorted(set(ENGINE) - COMMANDS))
def test_the_engine_never_imports_adapters_or_commands(module):
    names = set(imported(ast.walk(parse(module)), module))
    assert not set(own(names)) & (COMMANDS | set(ADAPTERS) | {"integrations"})
    assert not {name.split(".")[0] for name in names} & {"trl", "axolotl", "integrations"}


@pytest.mark.parametrize("module", sorted(ADAPTERS))
def test_adapters_never_import_commands(module):
    assert not set(own(imported(ast.walk(parse(module)), module))) & COMMANDS


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("from gelora_plugins.pipeline import measure", "layout", ["pipeline"]),
        ("from gelora_plugins import pipeline", "layout", ["pipeline"]),
        ("from gelora_plugins import select_ranks", "layout", ["pipeline"]),
        ("import gelora_plugins.pipeline", "layout", ["pipeline"]),
        ("from . import pipeline", "layout", ["pipeline"]),
        ("from .pipeline import measure", "layout", ["pipeline"]),
        ("try:\n    from gelora_plugins import cli\nexcept ImportError:\n    pass", "pipeline", ["cli"]),
        ("class A:\n    from gelora_plugins import cli", "pipeline", ["cli"]),
        ("from gelora_plugins import no_such_module", "pipeline", ["no_such_module"]),
        ("from gelora_plugins.integrations import trl", "pipeline", ["integrations.trl"]),
        ("if TYPE_CHECKING:\n    x = 1\nelse:\n    from gelora_plugins import cli", "pipeline", ["cli"]),
        ("if TYPE_CHECKING:\n    from gelora_plugins import cli", "pipeline", []),
        ("def f():\n    from gelora_plugins import cli", "pipeline", []),
        ("from gelora_plugins.errors import ProbeError", "layout", []),
        ("from gelora_plugins import report", "adapter", ["report"]),
        ("from .transformers import GeLoRACallback", "integrations.trl", []),
        ("from .. import cli", "integrations.trl", ["cli"]),
    ],
)
def test_the_check_of_imports_sees_what_counts(source, module, found):
    assert upward(ast.parse(source), module) == found


# What an import costs


def modules_after(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_imports_nothing_heavy():
    assert not HEAVY & modules_after("import gelora_plugins; gelora_plugins.GeLoRAConfig; gelora_plugins.hookimpl")


def test_the_check_of_heavy_imports_can_fail():
    assert {"torch", "numpy", "peft"} <= modules_after("import gelora_plugins; gelora_plugins.select_ranks")


@pytest.mark.parametrize(
    "module", ["cli", "config", "dimension", "hookspecs", "layout", "plugins", "policies", "ranks", "records", "report"]
)
def test_what_reads_saved_records_needs_no_torch(module):
    modules = modules_after(f"import gelora_plugins.{module}")
    assert f"gelora_plugins.{module}" in modules
    assert not HEAVY & modules


def test_every_public_name_exists_where_it_is_said_to_be():
    assert set(gelora_plugins._HOME) == set(gelora_plugins.__all__)
    assert set(gelora_plugins._HOME.values()) <= set(MODULES)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'gelora_plugins' has no attribute 'no_such_name'"):
        gelora_plugins.no_such_name  # noqa: B018


@pytest.fixture
def without_frameworks(monkeypatch):
    """As where neither trl nor axolotl is installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("axolotl", "trl") else find_spec(name)
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


@pytest.mark.parametrize("module", ["config", "errors", "mistakes", "records", "text"])
def test_the_lowest_modules_need_the_standard_library_only(module):
    names = imported(ast.walk(parse(module)), module)
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"gelora_plugins"}
