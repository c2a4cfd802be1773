"""Architecture: imports only point downwards, without cycles, and an attention call is short."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from comfyui_liteattention.backends import backend_for
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.run import Run
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.token_order import VideoTokens

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "comfyui_liteattention"

#: From the ground up. Modules on one line may import each other, but nothing from a line below.
FLOORS = (
    ("tiles", "token_order"),
    ("budget",),
    ("backends",),
    ("settings", "presets", "schedule"),
    ("policy", "plan", "tail", "eligibility"),
    ("attention",),
    ("never_slower",),
    ("report",),
    ("run",),
    ("doctor",),
    ("integrations",),
    ("nodes",),
    ("", "__main__"),
)
KERNELS = ("backends/cpu/kernels.py", "backends/gpu/kernels/")


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; the package itself is ""."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The package's modules that a module imports, for type checking or anywhere else."""
    path = MODULES[name]
    here = name.split(".") if name else []
    package = here if path.name == "__init__.py" else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            target = ".".join(filter(None, base))
            whole = {".".join(filter(None, (target, alias.name))) for alias in node.names}
            found |= {one if one in MODULES else target for one in whole}
    return found - {name}


def floor(name: str) -> int:
    room = name.split(".")[0]
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    assert [other for other in imports(name) if floor(other) > floor(name)] == []


def test_no_module_needs_itself():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in imports(name):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_the_top_holds_the_algorithm_alone():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def test_hardly_a_function_has_more_than_eight_parameters():
    long = []
    for name, path in MODULES.items():
        if path.relative_to(PACKAGE).as_posix().startswith(KERNELS):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = len([a for a in arguments if a.arg not in ("self", "cls")])
                long += [f"{name}.{node.name}"] if count > 8 else []
    assert len(long) <= 3, long


@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(script):
    importlib.import_module(f"benchmarks.{script.stem}")


@pytest.mark.parametrize("script", sorted(ROOT.glob("kernels/*.py")), ids=lambda path: path.stem)
def test_every_script_of_the_kernels_can_be_imported(script, monkeypatch):
    """Imported by its path, as it is run, because the folder is not a package."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location(f"script_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)


@pytest.mark.parametrize(("audit", "at_most"), [(4096, 60), (16, 80)])
def test_one_call_of_attention_goes_through_few_of_ours(audit, at_most):
    """In the middle of a run with a budget, in a call without audited rows and in one with some.
    Comprehensions don't count, since newer versions of Python don't implement them as calls."""
    pytest.importorskip("numba", reason="the CPU's kernel needs numba")
    backend = backend_for(torch.device("cpu"))
    settings = Settings(budget=0.2, min_tokens=0, never_slower=False, audit=audit)
    sigmas = [1 - i / 8 for i in range(9)]
    run, video = Run(settings, backend, sigmas), VideoTokens((4, 16, 16))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(1, 2, 1024, 64, generator=generator) for _ in range(3))
    calls: list[str] = []
    most: list[str] = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and str(PACKAGE) in code.co_filename and code.co_name[0] != "<":
            calls.append(code.co_name)

    for sigma in sigmas[:-1]:
        at = run.locate(sigma)
        run.begin_call(at.step)
        for layer in ("0", "1", "2"):
            calls.clear()
            sys.setprofile(note)
            try:
                out = run.attend(layer, ["positive"], at, Inputs(q, k, v, 0.125), video)
            finally:
                sys.setprofile(None)
            assert out is not None
            most = max(most, calls, key=len).copy()
        assert run.end_call(at.step, 0.0)
    assert run.report().active
    assert ("audit_skipped" in most) == (audit == 16)
    assert len(most) <= at_most, most
