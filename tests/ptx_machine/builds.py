"""PTX for cards that the project ships machine code for: compiled when first needed, and kept."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path

from comfyui_liteattention.backends.gpu import kernel_table
from comfyui_liteattention.backends.gpu.archive import Code
from comfyui_liteattention.backends.gpu.kernel_table import Kernel

ROOT = Path(__file__).resolve().parents[2]
_BUILD = ROOT / "kernels" / "build.py"


def compiled(arch: int, kernel: Kernel) -> Code:
    """What ``kernels/build.py`` makes of a kernel, before the assembler."""
    path = _path(arch, kernel)
    if not path.exists():
        prepare([(arch, kernel)])
    about = json.loads(path.with_suffix(".json").read_text())
    return Code(path.read_bytes(), about["warps"], about["shared"])


def prepare(wanted: Iterable[tuple[int, Kernel]]) -> None:
    """Compile what isn't there yet, in a process of its own: this one may have Triton's
    interpreter, and another folder called tests on its path (ComfyUI has one)."""
    missing = [job for job in dict.fromkeys(wanted) if not _path(*job).exists()]
    if missing:
        names = [f"{arch}:{kernel.name}" for arch, kernel in missing]
        command = [sys.executable, "-m", "tests.ptx_machine.builds", *names]
        subprocess.run(command, cwd=ROOT, check=True)


def _compile_all(names: list[str]) -> None:
    """Several at once; each name is ``arch:kernel``."""
    kernels = {kernel.name: kernel for kernel in kernel_table.KERNELS}
    jobs = [(int(arch), kernels[name]) for arch, name in (text.split(":") for text in names)]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), fresh) as pool:
        list(pool.map(_compile, jobs))


def _compile(job: tuple[int, Kernel]) -> None:
    spec = importlib.util.spec_from_file_location("liteattention_build", _BUILD)
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    built, path = build.compile_kernel(job), _path(*job)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"warps": built.warps, "shared": built.shared}
    path.with_suffix(".json").write_text(json.dumps(about))
    part = path.with_suffix(f".{os.getpid()}")  # a run that is stopped leaves no half a file
    part.write_bytes(built.ptx)
    part.replace(path)


def _path(arch: int, kernel: Kernel) -> Path:
    return ROOT / ".dev" / "ptx" / _key() / f"sm_{arch}" / f"{kernel.name}.ptx"


@cache
def _key() -> str:
    """Changes with whatever compiled code depends on."""
    table = Path(kernel_table.__file__)
    sources = [*sorted(table.parent.glob("kernels/*.py")), table, _BUILD]
    text = b"".join(path.read_bytes() for path in sources) + version("triton").encode()
    return hashlib.sha256(text).hexdigest()[:16]


def prepare_all(arch: int) -> None:
    """Compile every kernel of a card."""
    prepare((arch, kernel) for kernel in kernel_table.KERNELS if kernel.config(arch))


if __name__ == "__main__":
    _compile_all(sys.argv[1:])
