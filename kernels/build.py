"""Compile every prebuilt kernel, ahead of time and without a GPU.

    python kernels/build.py [--archive sm_90] [--only d128_bf16_lists_mass] [--out DIR] [--jobs N]
    python kernels/build.py --check [--archive sm_90]

Writes one ``sm_<arch>.zip`` of cubins per archive of the table, ``ptx.zip`` for cards that have
none, and ``manifest.json`` with the sha256 of each kernel, what it was made from, and the driver
that each archive needs. Kernels that are there already, made from the same, are kept. Needs triton;
the bytes depend only on the source and on the versions of triton and of its assemblers.

``--check`` compiles as the fallback does on a card, with whichever triton is installed (3.5 or
later), and writes nothing.
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
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from comfyui_liteattention.backends.gpu import kernel_table as table
from comfyui_liteattention.backends.gpu.archive import FOLDER, FORMAT, parameters, recipe
from comfyui_liteattention.backends.gpu.driver import SINCE
from comfyui_liteattention.backends.gpu.kernel_table import Kernel

#: Triton's name for it is older than what it is used for.
NEWER_ASSEMBLER = "TRITON_PTXAS_BLACKWELL_PATH"

#: CUDA versions, as the driver tells its own: of the machine code of each assembler, by its major
#: version; of a first driver that knows a card; of the PTX that is shipped.
CUDA_OF_ASSEMBLER = {"12": 12000, "13": 13000}
CUDA_OF_ARCH = {100: 12080, 103: 12090, 120: 12080, 121: 12090}
CUDA_OF_PTX = 12000


class Job(NamedTuple):
    """What to compile: for which compute capability, which kernel, with which assembler."""

    arch: int
    kernel: Kernel
    newer_assembler: bool = False


class Built(NamedTuple):
    """One compiled kernel: machine code, PTX, and what the launcher must know."""

    arch: int
    kernel: Kernel
    cubin: bytes
    ptx: bytes
    shared: int
    warps: int
    ptxas: str


def compile_kernel(job: tuple[Any, ...]) -> Built:
    """Triton source -> PTX and cubin for one architecture; ``job``: a :class:`Job`."""
    arch, kernel, newer = Job(*job)
    with chosen_assembler(newer):
        compiled, ptxas = _compiled(arch, kernel), assembler_version(arch)
    info = compiled.metadata
    _check_launchable(info, kernel)
    ptx = compiled.asm["ptx"].encode()
    return Built(arch, kernel, compiled.asm["cubin"], ptx, info.shared, info.num_warps, ptxas)


def refused(job: Job) -> str | None:
    """Why this triton doesn't compile a kernel, or None."""
    try:
        _compiled(job.arch, job.kernel)
    except Exception as error:  # whatever a compiler throws
        return f"{job.kernel.name} for sm_{job.arch}: {type(error).__name__}: {error}"
    return None


def _compiled(arch: int, kernel: Kernel) -> Any:
    """What triton makes of a kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from comfyui_liteattention.backends.gpu.jit import source

    config = kernel.config(arch)
    if config is None:
        raise ValueError(f"the table has no {kernel.name} for sm_{arch}")
    function = source(kernel.entry)
    signature, attributes = {}, {}
    for place, (name, type_) in enumerate(kernel.entry.parameters):
        signature[name] = re.sub("io|qk|pv", lambda found: kernel.types[found[0]], type_)
        if (divisor := table.divisor(kernel, name, type_)) > 1:
            attributes[(place,)] = [["tt.divisibility", divisor]]
    constants = kernel.constants()
    signature |= dict.fromkeys(constants, "constexpr")
    if tuple(signature) != tuple(function.arg_names):
        raise RuntimeError(f"kernel_table and the arguments of {kernel.entry.name} differ")
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        return triton.compile(
            ASTSource(function, signature, places, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": config.warps,
                "num_stages": config.stages,
                "enable_fp_fusion": True,
                **({"ptx_version": table.PTX_VERSION} if arch == table.PTX_ARCH else {}),
            },
        )


@contextmanager
def chosen_assembler(newer: bool) -> Iterator[None]:
    """Have triton use its older assembler, which it does by itself before sm_90 alone, or not."""
    if newer:
        yield
        return
    from triton.backends.nvidia.compiler import get_ptxas

    os.environ[NEWER_ASSEMBLER] = get_ptxas(80).path
    try:
        yield
    finally:
        del os.environ[NEWER_ASSEMBLER]


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


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """A zip file whose bytes depend on nothing but the members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(members.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


def describe(built: Built, code: bytes, archive: table.Archive) -> dict[str, Any]:
    """A kernel's entry in the manifest."""
    return {
        "entry": built.kernel.entry.name,
        "constants": built.kernel.constants(),
        "warps": built.warps,
        "shared": built.shared,
        "ptxas": built.ptxas,
        "bytes": len(code),
        "sha256": hashlib.sha256(code).hexdigest(),
        "recipe": recipe(built.kernel, archive),
    }


def needed_driver(arch: int, entries: dict[str, dict[str, Any]], ptx: bool) -> int:
    """The oldest driver (its branch: 525, 570, ...) that takes all of an archive."""
    if ptx:
        return SINCE[CUDA_OF_PTX]
    by_assembler = (CUDA_OF_ASSEMBLER[e["ptxas"].split(".")[0]] for e in entries.values())
    return SINCE[max(*by_assembler, CUDA_OF_ARCH.get(arch, 0))]


def archives_of(name: str) -> list[str]:
    """What is written of an archive's kernels: machine code, and for one card PTX as well."""
    return [name, "ptx"] if table.ARCHIVES[name].arch == table.PTX_ARCH else [name]


def archive_of(name: str) -> table.Archive:
    return table.Archive(table.PTX_ARCH) if name == "ptx" else table.ARCHIVES[name]


class Shelf:
    """Archives and their manifest in a folder: what is there, and what is added."""

    def __init__(self, folder: Path) -> None:
        import triton

        self.folder, self.triton = folder, triton.__version__
        path = folder / "manifest.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        same = old.get("format") == FORMAT and old.get("triton") == self.triton
        self.archives: dict[str, Any] = old.get("archives", {}) if same else {}

    def has(self, name: str, kernel: Kernel) -> bool:
        """Whether the kernel is there, made from what there is now."""
        entry = self.archives.get(name, {}).get("kernels", {}).get(kernel.name, {})
        return bool(entry.get("recipe") == recipe(kernel, archive_of(name)))

    def put(self, name: str, wanted: list[Kernel], built: list[Built]) -> None:
        """Write an archive of the ``wanted`` kernels: those ``built``, and others that are here."""
        code, suffix = ("ptx", ".ptx") if name == "ptx" else ("cubin", ".cubin")
        path = self.folder / f"{name}.zip"
        fresh = {b.kernel.name: b for b in built}
        kept = [kernel.name for kernel in wanted if kernel.name not in fresh]
        members: dict[str, bytes] = {n + suffix: getattr(b, code) for n, b in fresh.items()}
        if kept:
            with zipfile.ZipFile(path) as there:
                members |= {n + suffix: there.read(n + suffix) for n in kept}
        old = self.archives.get(name, {}).get("kernels", {})
        entries = {n: old[n] for n in kept}
        archive = archive_of(name)
        entries |= {n: describe(b, members[n + suffix], archive) for n, b in fresh.items()}
        self.archives[name] = {
            "arch": archive.arch,
            "driver": needed_driver(archive.arch, entries, name == "ptx"),
            "kernels": dict(sorted(entries.items())),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_archive(path, members)
        self._write_manifest()

    def _write_manifest(self) -> None:
        manifest = {
            "format": FORMAT,
            "triton": self.triton,
            "tile": [table.TILE.q, table.TILE.k],
            "parameters": parameters(),
            "archives": dict(sorted(self.archives.items())),
        }
        text = json.dumps(manifest, indent=1) + "\n"
        (self.folder / "manifest.json").write_text(text, newline="\n")


def build(names: list[str], only: str | None, jobs: int, shelf: Shelf) -> None:
    """Compile what isn't on the shelf yet, with a progress bar; every archive is written as soon as
    it is complete."""
    from tqdm import tqdm

    wanted: dict[str, list[Kernel]] = {}
    work: dict[str, list[Job]] = defaultdict(list)
    for name in names:
        arch, newer = table.ARCHIVES[name]
        kernels = [k for k in table.KERNELS if k.config(arch) and only in (None, k.name)]
        wanted[name] = kernels
        targets = archives_of(name)
        for kernel in kernels:
            if not all(shelf.has(target, kernel) for target in targets):
                work[name].append(Job(arch, kernel, newer))
    if not any(wanted.values()):
        sys.exit(f"no kernel is called {only}; there are {[k.name for k in table.KERNELS]}")
    bar = tqdm(total=sum(map(len, work.values())), unit="kernel", disable=None)
    with ProcessPoolExecutor(jobs) as pool:
        for name in names:
            built = []
            for result in pool.map(compile_kernel, work[name]):
                built.append(result)
                bar.update()
            for target in archives_of(name):
                shelf.put(target, wanted[name], built)
    bar.close()


def check(names: list[str], jobs: int) -> str | None:
    """Have the triton that is installed compile all kernels of the cards of some archives; why it
    doesn't, where it doesn't."""
    import triton
    from tqdm import tqdm

    archs = sorted({table.ARCHIVES[name].arch for name in names})
    work = [Job(arch, kernel) for arch in archs for kernel in table.KERNELS if kernel.config(arch)]
    with ProcessPoolExecutor(jobs) as pool:
        found = list(tqdm(pool.map(refused, work), total=len(work), unit="kernel", disable=None))
    problems = [problem for problem in found if problem is not None]
    cards = ", ".join(f"sm_{arch}" for arch in archs)
    good = len(work) - len(problems)
    print(f"triton {triton.__version__} compiles {good} of {len(work)} kernels for {cards}")
    return "\n".join(problems) or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(table.ARCHIVES)
    parser.add_argument("--archive", action="append", choices=known, help="default: all")
    parser.add_argument("--only", metavar="NAME", help="one kernel; never into the package")
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: the package")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--check", action="store_true", help="compile, and write nothing")
    args = parser.parse_args()
    if args.check:
        sys.exit(check(args.archive or known, args.jobs))
    if args.only and args.out == FOLDER:
        parser.error("--only needs --out: the package must hold every variant")
    build(args.archive or known, args.only, args.jobs, Shelf(args.out))
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
