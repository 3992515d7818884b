"""examples/quickstart.ipynb: its cells run in order in one namespace, and what they show is saved in it.

`python -m tests.readme.notebook` writes it. Needs no Jupyter.
"""

import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return found


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def digest(notebook: dict[str, Any]) -> str:
    """SHA-256 of the code that the saved outputs are of."""
    return hashlib.sha256("\0".join("".join(cell["source"]) for cell in code_cells(notebook)).encode()).hexdigest()


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the cells and put what each shows into it. Returns the namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook), 1):
        printed, value = _run_cell("".join(cell["source"]), number, names)
        outputs: list[dict[str, Any]] = []
        if printed:
            outputs.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
        if value is not None:
            shown = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
            outputs.append({**shown, "data": _display(value)})
        cell.update(execution_count=number, outputs=outputs)
    notebook["metadata"]["gelora"] = {"outputs_of": digest(notebook)}
    return names


def _run_cell(source: str, number: int, names: dict[str, Any]) -> tuple[str, Any]:
    """(what the cell prints, the value of its last line where that is an expression)."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
    return printed.getvalue(), value


def _display(value: Any) -> dict[str, Any]:
    """What a notebook shows of a value, by its own methods, of which some give nothing."""
    page, picture = (getattr(value, f"_repr_{kind}_", lambda: None)() for kind in ("html", "png"))
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if page is not None:
        data["text/html"] = page.splitlines(keepends=True)
    if picture is not None:
        data["image/png"] = base64.b64encode(picture).decode()
    return data


def main() -> None:
    notebook = read()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        run(notebook)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"-> {NOTEBOOK}", file=sys.stderr)


if __name__ == "__main__":
    main()
