"""As people unpack ComfyUI: one folder with spaces and foreign letters in its name, the pack among
its custom nodes where nobody may write, and no network."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from demo.comfy_server import ComfyServer, comfyui_path, make_base
from demo.compare import BUDGET, REPORT, VIDEO, WORKFLOW
from demo.workflow import find, load_workflow, to_graph

REPOSITORY = Path(__file__).parents[2]
OFFLINE = REPOSITORY / "tests" / "environment" / "offline"
PACK = (
    "__init__.py",
    "comfyui_liteattention",
    "install.py",
    "locales",
    "pyproject.toml",
    "requirements.txt",
    "web",
    "workflows",
)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A ComfyUI with our pack inside, as a portable archive has it."""
    tree = tmp_path_factory.mktemp("portable") / "Größe 视频 (my PC)" / "ComfyUI"
    copy(comfyui_path(), tree)
    make_base(tree, nodes=False)
    nodes = tree / "custom_nodes"
    for name in PACK:
        copy(REPOSITORY / name, nodes / "ComfyUI-LiteAttention" / name)
    copy(REPOSITORY / "demo", nodes / "liteattention_demo")
    paths = [nodes, *nodes.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield tree
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.fixture
def alone(tree, tmp_path, monkeypatch):
    """The file in which attempts to reach the network are noted."""
    log = tmp_path / "attempts"
    log.touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    monkeypatch.setenv("PYTHONPATH", str(OFFLINE))
    monkeypatch.setenv("OFFLINE_LOG", str(log))
    # Who may write anywhere, such as root, would leave this in the folder.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return log


def test_it_generates_offline_and_leaves_its_folder_as_it_was(tree, alone, tmp_path):
    pack = tree / "custom_nodes" / "ComfyUI-LiteAttention"
    before = contents(pack)
    with ComfyServer(tree, tmp_path / "comfyui.log") as server:
        graph = to_graph(load_workflow(WORKFLOW), server.get("/object_info"))
        graph[find(graph, "LiteAttentionDemoLatent")]["inputs"].update(width=32, height=32)
        graph[find(graph, "KSampler")]["inputs"]["steps"] = 4
        graph[find(graph, BUDGET)]["inputs"].update(budget=0.05, ramp=0.0, min_tokens=0)
        finished = server.run(graph)
        assert finished.error is None
        report = finished.outputs[find(graph, REPORT)]
        assert report["text"][0].startswith("LiteAttention active"), report["text"][0]
        video = finished.outputs[find(graph, VIDEO)]["images"][0]
        assert server.output_file(video).stat().st_size > 0
    log = (tmp_path / "comfyui.log").read_text(errors="replace")
    assert "IMPORT FAILED" not in log
    assert alone.read_text() == ""
    assert contents(pack) == before


def test_the_managers_script_looks_and_leaves_all_as_it_was(tree, alone):
    pack = tree / "custom_nodes" / "ComfyUI-LiteAttention"
    before = contents(tree)
    done = subprocess.run(
        [sys.executable, "install.py"],
        cwd=pack,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0
    assert "self-test passed" in done.stdout, done.stdout + done.stderr
    assert alone.read_text() == ""
    assert contents(tree) == before


def test_the_prebuilt_kernels_are_read_from_there(tree, alone):
    """No card is needed to read and verify them."""
    pack = tree / "custom_nodes" / "ComfyUI-LiteAttention"
    look = (
        "import comfyui_liteattention as lite\n"
        "from comfyui_liteattention.backends.gpu.archive import Prebuilt\n"
        "from comfyui_liteattention.backends.gpu.kernel_table import VARIANTS\n"
        "prebuilt = Prebuilt()\n"
        "for archive in prebuilt.manifest['archives']:\n"
        "    print(archive, len(prebuilt.read(archive, VARIANTS[0]).image))\n"
        "print(lite.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], cwd=pack, capture_output=True, text=True, check=True
    )
    *archives, file = done.stdout.splitlines()
    assert {line.split()[0] for line in archives} >= {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120"}
    assert all(int(line.split()[1]) > 1000 for line in archives)
    assert Path(file).is_relative_to(pack)


def test_the_guard_guards(alone):
    reach = "import urllib.request as r; r.urlopen('https://example.org')"
    done = subprocess.run([sys.executable, "-c", reach], capture_output=True, text=True)
    assert "no network in this test" in done.stderr
    assert "example.org" in alone.read_text()
