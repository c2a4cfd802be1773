"""Install the pack with the real ComfyUI-Manager, start ComfyUI, uninstall, and see what is left.

    .dev/venv/bin/python tests/environment/manager.py [--manager 4.3]

Not among the tests: it downloads the Manager and what it needs (about 40 MB) into an environment of
its own, which is deleted at the end. The Manager clones this repository as it clones any: git is
told that the address in it leads here. Only what is committed is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from demo.comfy_server import ComfyServer, comfyui_path, comfyui_version  # noqa: E402

ADDRESS = "https://github.com/liteattention/ComfyUI-LiteAttention"
NEEDS = ["GitPython", "PyGithub", "typer", "rich", "toml", "chardet", "packaging", "nh3", "uv"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manager", default="4.3", help="version of comfyui-manager")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "My ComfyUI ü"
        tree = base / "ComfyUI"
        shutil.copytree(comfyui_path(), tree, ignore=shutil.ignore_patterns("custom_nodes"))
        nodes = tree / "custom_nodes"
        nodes.mkdir()
        python = make_environment(base / "environment", options.manager)
        environment = os.environ | {
            "COMFYUI_PATH": str(tree),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{REPOSITORY}.insteadOf",
            "GIT_CONFIG_VALUE_0": ADDRESS,
        }

        def manager(*arguments: str) -> None:
            command = [python, "-m", "cm_cli", *arguments, "--mode", "local"]
            subprocess.run(command, env=environment, check=True)

        manager("show", "installed")  # makes its own files
        before, packages = files(tree), installed(python)
        manager("install", ADDRESS)
        expect(installed(python) == packages, "installing changes no package")
        (pack,) = nodes.iterdir()
        os.environ["COMFYUI_PATH"] = str(tree)
        with ComfyServer(tree, base / "log") as server:
            names = [name for name in server.get("/object_info") if "LiteAttention" in name]
        expect(len(names) >= 7, f"{len(names)} nodes load from {pack.name}")
        manager("uninstall", f"{pack.name}@unknown")
        left = {path for path in files(tree) - before if "liteattention" in path.lower()}
        expect(not left and not list(nodes.iterdir()), f"uninstalling leaves {left or 'nothing'}")
        print(f"ComfyUI {comfyui_version(tree)}, ComfyUI-Manager {options.manager}: all well")
    return 0


def make_environment(folder: Path, version: str) -> Path:
    """An environment with the Manager that sees the packages of this one, and changes its own."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, *NEEDS], check=True)
    subprocess.run([*pip, "--no-deps", f"comfyui-manager=={version}"], check=True)
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", find], text=True).strip())
    here = sysconfig.get_path("purelib")
    (packages / "zz_outer.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return python


def installed(python: Path) -> str:
    """What pip sees, less the front end: ComfyUI's pin of it is the Manager's business."""
    listed = subprocess.check_output([python, "-m", "pip", "freeze"], text=True)
    return "\n".join(line for line in listed.splitlines() if "comfyui" not in line.lower())


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


def expect(holds: bool, what: str) -> None:
    print(("ok: " if holds else "NOT SO: ") + what, flush=True)
    if not holds:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
