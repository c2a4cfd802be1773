"""docs/diffusers.ipynb runs from top to bottom, on the demo's weights, and shows what it stores."""

import json
from pathlib import Path

import notebook
import pytest

PATH = Path(__file__).parents[1] / "docs" / "diffusers.ipynb"


@pytest.fixture(scope="module")
def stored():
    return json.loads(PATH.read_text(encoding="utf-8"))


def kinds(outputs):
    """What a cell shows: text that was printed, values, pictures."""
    return [sorted(one.get("data", {one["output_type"]: ""})) for one in outputs]


def test_its_pictures_are_small(stored):
    assert PATH.stat().st_size < 400 << 10
    shown = [kind for cell in notebook.code(stored) for kind in kinds(cell["outputs"])]
    assert sum("image/png" in kind for kind in shown) >= 4


def test_it_runs_from_top_to_bottom(stored, monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.chdir(PATH.parent)
    found = notebook.run(stored)
    for cell, outputs in zip(notebook.code(stored), found, strict=True):
        if notebook.kept(cell):
            assert kinds(outputs) == kinds(cell["outputs"]), "".join(cell["source"])
    assert found[-1][0]["data"]["text/plain"] == "True"  # dense again, bit for bit
