"""A notebook run from top to bottom without Jupyter: its code, and what it shows.

    PYTHONPATH=.:tests/tiny python -m notebook docs/diffusers.ipynb

writes its outputs into it anew. Outputs of cells tagged ``machine`` depend on the machine that ran
them, as seconds do, and are not kept.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def run(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Run all code cells, one after the other; the outputs of each, in Jupyter's form."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [_run_cell("".join(cell["source"]), names, n) for n, cell in enumerate(code(notebook))]


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kept(cell: dict[str, Any]) -> bool:
    """Whether the outputs of a cell are stored."""
    return "machine" not in cell["metadata"].get("tags", ())


def _run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"<cell {number}>", "exec"), names)  # noqa: S102
        if isinstance(last, ast.Expr):
            expression = compile(ast.Expression(last.value), f"<cell {number}>", "eval")
            value = eval(expression, names)  # noqa: S307
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append(dict(output_type="stream", name="stdout", text=printed.getvalue()))
    if value is not None:
        shown = dict(output_type="execute_result", execution_count=number + 1, metadata={})
        found.append(shown | {"data": _shown(value)})
    return found


def _shown(value: Any) -> dict[str, str]:
    """What Jupyter would show of a value."""
    shown = {"text/plain": repr(value)}
    if isinstance(value, Image.Image):
        data = io.BytesIO()
        value.convert("RGB").quantize(96).save(data, "PNG", optimize=True)  # to be stored small
        picture = base64.b64encode(data.getvalue()).decode()
        return {"image/png": picture, "text/plain": f"<{value.width} x {value.height}>"}
    return shown


def main(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, (cell, found) in enumerate(zip(code(notebook), run(notebook), strict=True)):
        cell["execution_count"] = number + 1
        cell["outputs"] = found if kept(cell) else []
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
