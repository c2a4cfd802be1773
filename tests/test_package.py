"""What gets installed: all that is needed, and nothing heavy."""

import ast
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "comfyui_liteattention"
PACKAGES = ("comfyui_liteattention", "liteattention")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel of what git knows, built from a copy: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES, "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-q", "-w", folder], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


#: Compiles one of the CPU's kernels and has its code kept on disk.
COMPILE = """
import torch
from comfyui_liteattention.backends.cpu.backend import _load_kernels, _pack

packed = _pack(_load_kernels(), torch.zeros(1, 1, 64, 32), torch.zeros(1, 1, 64, 32))
packed.task.do(0, 0, 0, 1)
"""


def test_uninstalling_leaves_nothing(wheel, tmp_path, monkeypatch):
    """Also where kernels were compiled: the package can't be imported any more, not even as the
    empty namespace that a folder with forgotten files is."""
    pytest.importorskip("numba")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout[:-1])
    # torch and numba are those of this environment.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "-q"]
    subprocess.run([*pip, "install", "--no-deps", wheel.filename], check=True)
    subprocess.run([python, "-c", COMPILE], cwd=tmp_path, check=True)
    assert list((packages / "comfyui_liteattention").rglob("*.pyc"))
    if sys.platform != "darwin":  # there the cache is at home, wherever the test is
        assert list((tmp_path / "cache" / "liteattention").rglob("*.pack-*.nbc"))
    subprocess.run([*pip, "uninstall", "-y", "liteattention"], check=True)
    assert [path.name for path in packages.iterdir()] == ["others.pth"]


def test_the_wheel_holds_the_code_and_the_kernels(wheel):
    names = set(wheel.namelist())
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".zip", ".json", ".typed") and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in names
    assert any(name.startswith("comfyui_liteattention/backends/gpu/archives/sm_") for name in names)
    assert not any(name.startswith(("tests", "demo", "benchmarks", "kernels")) for name in names)
    assert sum(info.compress_size for info in wheel.infolist()) < 12 << 20


def test_the_distribution_can_be_imported_by_its_name():
    code = "import liteattention as a, comfyui_liteattention as b; assert a.enable is b.enable"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "liteattention", "--version"]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said.startswith("LiteAttention ")


LIBRARIES = ("torch", "diffusers", "numpy", "PIL", "tqdm")
SCRIPT = """
from diffusers import WanPipeline

import liteattention as lite
from comfyui_liteattention import Settings

pipe: WanPipeline
handle: lite.Handle = lite.enable(pipe, preset="fast", dense_layers=(0,), audit=32)
with lite.enabled(pipe, budget=0.1) as other:
    report: lite.RunReport | None = other.report()
    if report is not None:
        share: float = report.computed_fraction
        data: dict[str, object] = report.to_dict()
lite.logging.set_verbosity_info()
settings: Settings = handle.settings
print(handle.status, lite.summary(pipe))
lite.enable(pipe, preset="Bold")  # type: ignore[arg-type]
lite.enable(pipe, audits=3)  # type: ignore[call-arg]
lite.disable(pipe)
"""


def test_a_script_of_a_user_is_typed(tmp_path):
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # Other libraries are left out: it would take minutes to read them.
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\nignore_missing_imports = True\nfollow_imports = silent\n"
        + "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in LIBRARIES)
    )
    command = [sys.executable, "-m", "mypy", str(script)]
    paths = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stdout


def test_installing_touches_nothing_else():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == []
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line.strip() and not line.startswith("#")] == []


def test_nothing_is_installed_or_evaluated_at_run_time():
    forbidden = {"eval", "exec", "__import__", "compile"}
    for path in [*PACKAGE.rglob("*.py"), ROOT / "install.py", ROOT / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, path
            if isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & {"subprocess", "pickle"}, path
