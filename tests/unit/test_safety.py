"""What the package never does: unpickle, run code from a model or a file, hand a string to a shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("gelora_plugins", "integrations") for path in (ROOT / folder).rglob("*.py"))

MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {"torch.load", "torch.hub.load", "eval", "exec", "compile", "os.system", "os.popen", "yaml.load"}
ARGUMENTS = {"trust_remote_code": False, "allow_pickle": False, "shell": False}


def unsafe(source: str) -> list[str]:
    """What a source does of that, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES or name in CALLS]
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                found.append(f"{node.lineno}: {ast.unparse(node.func)}")
            for argument in node.keywords:
                if argument.arg in ARGUMENTS and ast.unparse(argument.value) != str(ARGUMENTS[argument.arg]):
                    found.append(f"{argument.value.lineno}: {argument.arg}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_module_does_any_of_it(path: Path) -> None:
    assert unsafe(path.read_text(encoding="utf-8")) == []


def test_there_are_modules_to_look_at() -> None:
    assert {"json_files.py", "export.py", "plan.py", "trl.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import joblib.memory",
        "import torch\ntorch.load('a')",
        "from torch import load",
        "torch.load('a', weights_only=True)",
        "AutoModel.from_pretrained('a', trust_remote_code=True)",
        "AutoModel.from_pretrained('a', trust_remote_code=flag)",
        "np.load('a', allow_pickle=True)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_check_sees_it(source: str) -> None:
    assert unsafe(source)


def test_the_check_lets_safe_code_pass() -> None:
    assert unsafe("model.eval()\nre.compile('a')\nf(trust_remote_code=False)\nload('a')\n'a pickle'") == []
