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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from comfyui_liteattention.backends import cuda_variants as table
from comfyui_liteattention.backends.cuda_variants import Variant

PACKAGE = Path(sys.path[0]) / "comfyui_liteattention"
SOURCE = PACKAGE / "backends" / "triton_kernel.py"
PREBUILT = PACKAGE / "backends" / "prebuilt"


class Built(NamedTuple):
    """One compiled kernel: machine code, PTX, and what the launcher must know."""

    arch: int
    variant: Variant
    cubin: bytes
    ptx: bytes
    shared: int
    warps: int
    ptxas: str


def compile_variant(job: tuple[int, Variant]) -> Built:
    """Triton source -> cubin for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from comfyui_liteattention.backends.triton_kernel import attend_tiles

    arch, variant = job
    config = table.CONFIGS[arch][variant.head_dim]
    signature, attributes = {}, {}
    for place, (name, type_) in enumerate(table.PARAMETERS):
        signature[name] = type_.replace("io", variant.dtype)
        if type_.startswith("*"):
            attributes[(place,)] = [["tt.divisibility", table.POINTER_ALIGNMENT]]
        elif name.endswith(("_batch", "_head", "_row")):
            attributes[(place,)] = [["tt.divisibility", table.STRIDE_ALIGNMENT]]
    signature |= dict.fromkeys(variant.constants(), "constexpr")
    if tuple(signature) != tuple(attend_tiles.arg_names):
        raise RuntimeError("cuda_variants.PARAMETERS and the kernel's arguments differ")
    constants = {(attend_tiles.arg_names.index(n),): v for n, v in variant.constants().items()}

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        compiled = triton.compile(
            ASTSource(attend_tiles, signature, constants, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": config.warps,
                "num_stages": config.stages,
                "enable_fp_fusion": True,
            },
        )
    info = compiled.metadata
    _check_launchable(info)
    ptx = compiled.asm["ptx"]
    return Built(
        arch, variant, compiled.asm["cubin"], ptx.encode(), info.shared, info.num_warps,
        assembler_version(arch),
    )  # fmt: skip


def _check_launchable(info: Any) -> None:
    """The loader knows one way to launch; a kernel that wants another is a build error."""
    if info.name != table.ENTRY:
        raise RuntimeError(f"entry point is {info.name}, the loader expects {table.ENTRY}")
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
    """sha256 of the kernel's source, whatever the line ends of the checkout."""
    return hashlib.sha256(SOURCE.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


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
    variant = built.variant
    return {
        "head_dim": variant.head_dim,
        "dtype": variant.dtype,
        "lists": variant.lists,
        "criterion": variant.criterion,
        "tile": [table.TILE.q, table.TILE.k],
        "warps": built.warps,
        "shared": built.shared,
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

    def add(name: str, arch: int, kernels: dict[Variant, tuple[Built, bytes]]) -> None:
        suffix = ".ptx" if name == "ptx" else ".cubin"
        write_archive(out / f"{name}.zip", {v.name + suffix: c for v, (_, c) in kernels.items()})
        archives[name] = {
            "arch": arch,
            "ptxas": next(iter(kernels.values()))[0].ptxas,
            "kernels": {v.name: describe(b, c) for v, (b, c) in sorted(kernels.items(), key=str)},
        }

    for arch in sorted({b.arch for b in built}):
        ours = [b for b in built if b.arch == arch]
        add(f"sm_{arch}", arch, {b.variant: (b, b.cubin) for b in ours})
        if arch == table.PTX_ARCH:
            add("ptx", arch, {b.variant: (b, b.ptx) for b in ours})
    manifest = {
        "format": 1,
        "triton": triton.__version__,
        "source_sha256": source_hash(),
        "entry": table.ENTRY,
        "parameters": dict(table.PARAMETERS),
        "archives": dict(sorted(archives.items())),
    }
    path.write_text(json.dumps(manifest, indent=1) + "\n", newline="\n")


def build(archs: list[int], only: str | None, jobs: int) -> list[Built]:
    """Compile the chosen variants, with a progress bar."""
    from tqdm import tqdm

    variants = [v for v in table.VARIANTS if only in (None, v.name)]
    if not variants:
        sys.exit(f"no kernel is called {only}; there are {[v.name for v in table.VARIANTS]}")
    work = [(arch, variant) for arch in archs for variant in variants]
    bar = tqdm(total=len(work), unit="kernel", disable=None)
    built = []
    if jobs == 1:
        for job in work:
            built.append(compile_variant(job))
            bar.update()
    else:
        with ProcessPoolExecutor(jobs) as pool:
            for result in pool.map(compile_variant, work):
                built.append(result)
                bar.update()
    bar.close()
    return built


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(table.CONFIGS)
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
