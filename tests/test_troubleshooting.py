"""docs/troubleshooting.md explains every reason that the code can give for staying dense."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "comfyui_liteattention"
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
NOT_ABOUT_RUNS = {"doctor.py", "settings.py", "first_words.py"}  # they speak in their own words
FILES = sorted(
    path
    for room in (
        "*.py",
        "budget/*.py",
        "never_slower/*.py",
        "backends/**/*.py",
        "integrations/**/*.py",
        "report/s*.py",
    )
    for path in PACKAGE.glob(room)
    if path.name not in NOT_ABOUT_RUNS
)
TAKERS = ("decline", "_stop")
NAMES = ("reason", "why")
PARTS = {"LiteAttention inactive: ...", "unknown error"}  # of lines whose other part is the reason
ERRORS = ("DriverError", "ImageRefusedError", "PrebuiltError")  # their words become reasons


def constants(tree: ast.Module) -> dict[str, str]:
    """The texts among a module's constants."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(node.value.value, str)
    }


def texts(node: ast.AST, known: dict[str, str]) -> list[str]:
    """What an expression can say, with ``...`` for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(p.value if isinstance(p, ast.Constant) else "..." for p in parts)]
        case ast.Name(id=name) if name in known:
            return [known[name]]
        case ast.IfExp(body=one, orelse=other):
            return texts(one, known) + texts(other, known)
        case ast.BoolOp(values=several):
            return [text for one in several for text in texts(one, known)]
        case ast.Dict(keys=several) | ast.Set(elts=several):
            return [text for one in several if one is not None for text in texts(one, known)]
    return []


def gives_reasons(function: ast.FunctionDef) -> bool:
    """By its annotation (``str | None``, ``Backend | str``, ...), or its docstring."""
    given = ast.unparse(function.returns) if function.returns else ""
    kinds = given.split(" | ")
    says = re.search(r"\bwhy\b", ast.get_docstring(function) or "")
    return "FormOrReason" in kinds or (len(kinds) > 1 and "str" in kinds) or bool(says)


def expressions(tree: ast.Module) -> Iterator[ast.AST]:
    """Wherever a reason can be written."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() if gives_reasons(node):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        yield inner.value
            case ast.Call(func=ast.Attribute(attr=name), args=[first, *_]) if name in TAKERS:
                yield first
            case ast.Call(func=ast.Name(id="unsupported"), args=[first]):
                yield first
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[first])) if name in ERRORS:
                yield first
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    name = getattr(target, "attr", getattr(target, "id", ""))
                    if name in NAMES or name == "reasons":
                        yield value


def reasons(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    known = constants(tree)
    found = {text for node in expressions(tree) for text in texts(node, known)}
    # A single word is a name.
    return {text for text in found if len(text.replace("...", "").split()) >= 2} - PARTS


def documented() -> set[str]:
    """The code spans in the first column of the tables."""
    rows = re.findall(r"^\| (`+)(.+?)\1 \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {span for _, span in rows}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_reason_is_explained(path):
    assert not reasons(path) - documented()


def test_nothing_is_explained_that_is_never_said():
    assert not documented() - {reason for path in FILES for reason in reasons(path)}


def test_reasons_are_found():
    """The search itself: one of each kind of place, in each of the files that matter."""
    found = {path.relative_to(PACKAGE).as_posix(): reasons(path) for path in FILES}
    assert "cross-attention (queries and keys have different lengths)" in found["eligibility.py"]
    assert "short sequence (fewer than ... tokens)" in found["eligibility.py"]
    assert any("your own attention is faster" in reason for reason in found["never_slower/pace.py"])
    assert any("not enough memory" in reason for reason in found["run.py"])
    assert any("did not pass any" in reason for reason in found["integrations/comfy/takers.py"])
    assert len(found["integrations/diffusers/parallel.py"]) == 6
    assert len(found["integrations/comfy/families/__init__.py"]) == 2
    assert len(found["integrations/comfy/families/lightricks.py"]) == 3
    assert len(found["integrations/comfy/families/wan.py"]) == 2
    assert any("numba is not installed" in reason for reason in found["backends/cpu/backend.py"])
    assert any("CUDA driver error" in reason for reason in found["backends/gpu/driver.py"])
