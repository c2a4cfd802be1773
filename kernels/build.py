"""Compile every prebuilt kernel, ahead of time and without a GPU.

    python kernels/build.py [--arch 90] [--only d128_bf16_lists_mass] [--out DIR] [--jobs N]

Writes one ``sm_<arch>.zip`` of cubins per architecture, ``ptx.zip`` for cards that have none, and
``manifest.json`` with the sha256 of each. Needs triton; the bytes depend only on the source and on
the versions of triton and of its assembler, which the manifest records.
"""

# ruff: noqa: E402 - sys.path must be set right before anything else is imported

import os
import sys

# Not this folder, whose inspect.py would hide the standard library's, but its parent.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Line numbers would put this machine's paths into the cubins and triple their size.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

import argparse
import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from comfyui_liteattention.backends.gpu import kernel_table as table
from comfyui_liteattention.backends.gpu.archive import parameters
from comfyui_liteattention.backends.gpu.kernel_table import Kernel

PACKAGE = Path(sys.path[0]) / "comfyui_liteattention"
SOURCES = tuple(
    PACKAGE / "backends" / "gpu" / "kernels" / f"{module}.py"
    for module in sorted({kernel.entry.module for kernel in table.KERNELS})
)
PREBUILT = PACKAGE / "backends" / "gpu" / "archives"

BLACKWELL_ASSEMBLER = "TRITON_PTXAS_BLACKWELL_PATH"


class Built(NamedTuple):
    """One compiled kernel: machine code, PTX, and what the launcher must know."""

    arch: int
    kernel: Kernel
    cubin: bytes
    ptx: bytes
    shared: int
    warps: int
    ptxas: str


def compile_kernel(job: tuple[int, Kernel]) -> Built:
    """Triton source -> cubin for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from comfyui_liteattention.backends.gpu.jit import source

    arch, kernel = job
    config = kernel.config(arch)
    if config is None:
        raise ValueError(f"the table has no {kernel.name} for sm_{arch}")
    function = source(kernel.entry)
    signature, attributes = {}, {}
    for place, (name, type_) in enumerate(kernel.entry.parameters):
        signature[name] = re.sub("io|qk", lambda found: kernel.types[found[0]], type_)
        if (divisor := table.divisor(kernel, name, type_)) > 1:
            attributes[(place,)] = [["tt.divisibility", divisor]]
    constants = kernel.constants()
    signature |= dict.fromkeys(constants, "constexpr")
    if tuple(signature) != tuple(function.arg_names):
        raise RuntimeError(f"kernel_table and the arguments of {kernel.entry.name} differ")
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}

    with tempfile.TemporaryDirectory() as cache, chosen_assembler(config):
        os.environ["TRITON_CACHE_DIR"] = cache
        compiled = triton.compile(
            ASTSource(function, signature, places, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": config.warps,
                "num_stages": config.stages,
                "enable_fp_fusion": True,
            },
        )
        ptxas = assembler_version(arch)
    info = compiled.metadata
    _check_launchable(info, kernel)
    ptx = compiled.asm["ptx"].encode()
    return Built(arch, kernel, compiled.asm["cubin"], ptx, info.shared, info.num_warps, ptxas)


@contextmanager
def chosen_assembler(config: table.Config) -> Iterator[None]:
    """Have triton use its older assembler for Blackwell, if the configuration says so."""
    if not config.older_assembler:
        yield
        return
    from triton.backends.nvidia.compiler import get_ptxas

    os.environ[BLACKWELL_ASSEMBLER] = get_ptxas(80).path
    try:
        yield
    finally:
        del os.environ[BLACKWELL_ASSEMBLER]


def _check_launchable(info: Any, kernel: Kernel) -> None:
    """The loader knows one way to launch; a kernel that wants another is a build error."""
    if info.name != kernel.entry.name:
        raise RuntimeError(f"entry point is {info.name}, the loader expects {kernel.entry.name}")
    for need in (
        *("global_scratch_size", "profile_scratch_size"),
        *("launch_cooperative_grid", "launch_pdl"),
    ):
        if getattr(info, need, 0):
            raise RuntimeError(f"the loader doesn't provide {need}={getattr(info, need)}")
    if info.num_ctas != 1:
        raise RuntimeError("the loader doesn't launch clusters")


def assembler_version(arch: int) -> str:
    """Version of the ptxas that triton uses for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return re.sub(r"^.*release\s+|,.*$", "", str(get_ptxas(arch).version), flags=re.S).strip()


def source_hash() -> str:
    """sha256 of the kernels' sources, whatever the line ends of the checkout."""
    sources = b"".join(source.read_bytes() for source in SOURCES)
    return hashlib.sha256(sources.replace(b"\r\n", b"\n")).hexdigest()


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """A zip file whose bytes depend on nothing but the members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(members.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


def describe(built: Built, code: bytes) -> dict[str, Any]:
    """A kernel's entry in the manifest."""
    return {
        "entry": built.kernel.entry.name,
        "constants": built.kernel.constants(),
        "warps": built.warps,
        "shared": built.shared,
        "ptxas": built.ptxas,
        "bytes": len(code),
        "sha256": hashlib.sha256(code).hexdigest(),
    }


def write(built: list[Built], out: Path) -> None:
    """Archives and manifest; architectures that weren't built keep their entries."""
    import triton

    out.mkdir(parents=True, exist_ok=True)
    path = out / "manifest.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    archives = old.get("archives", {}) if old.get("source_sha256") == source_hash() else {}

    def add(name: str, arch: int, kernels: list[Built]) -> None:
        suffix, code = (".ptx", "ptx") if name == "ptx" else (".cubin", "cubin")
        codes = {b.kernel.name: getattr(b, code) for b in kernels}
        write_archive(out / f"{name}.zip", {n + suffix: c for n, c in codes.items()})
        described = {b.kernel.name: describe(b, codes[b.kernel.name]) for b in kernels}
        archives[name] = {"arch": arch, "kernels": dict(sorted(described.items()))}

    for arch in sorted({b.arch for b in built}):
        ours = [b for b in built if b.arch == arch]
        add(f"sm_{arch}", arch, ours)
        if arch == table.PTX_ARCH:
            add("ptx", arch, ours)
    manifest = {
        "format": 2,
        "triton": triton.__version__,
        "source_sha256": source_hash(),
        "tile": [table.TILE.q, table.TILE.k],
        "parameters": parameters(),
        "archives": dict(sorted(archives.items())),
    }
    path.write_text(json.dumps(manifest, indent=1) + "\n", newline="\n")


def build(archs: list[int], only: str | None, jobs: int) -> list[Built]:
    """Compile the chosen variants, with a progress bar."""
    from tqdm import tqdm

    kernels = [k for k in table.KERNELS if only in (None, k.name)]
    work = [(arch, kernel) for arch in archs for kernel in kernels if kernel.config(arch)]
    if not work:
        sys.exit(f"no kernel is called {only}; there are {[k.name for k in table.KERNELS]}")
    bar = tqdm(total=len(work), unit="kernel", disable=None)
    built = []
    if jobs == 1:
        for job in work:
            built.append(compile_kernel(job))
            bar.update()
    else:
        with ProcessPoolExecutor(jobs) as pool:
            for result in pool.map(compile_kernel, work):
                built.append(result)
                bar.update()
    bar.close()
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(table.ARCHS)
    parser.add_argument("--arch", type=int, action="append", choices=known, help="default: all")
    parser.add_argument("--only", metavar="NAME", help="one kernel; never into the package")
    parser.add_argument("--out", type=Path, default=PREBUILT, help="default: the package")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.only and args.out == PREBUILT:
        parser.error("--only needs --out: the package must hold every variant")
    write(build(args.arch or known, args.only, args.jobs), args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
