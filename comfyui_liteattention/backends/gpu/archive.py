"""The prebuilt machine code: which archive fits a card, and is it what was built?"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .kernel_table import KERNELS, PTX_ARCH, PTX_VERSION, TILE, Archive, Kernel, divisor

FOLDER = Path(__file__).parent / "archives"
FORMAT = 3
_SOURCES = Path(__file__).parent / "kernels"
#: What else a source of kernels takes functions from.
_IMPORTED = {"tail": ("attend",), "quantise": ("attend",), "values": ("attend", "quantise")}


class PrebuiltError(RuntimeError):
    """The folder of prebuilt kernels is missing, incomplete or changed."""


class Code(NamedTuple):
    """Verified machine code (or PTX) of one kernel, and how to launch it."""

    image: bytes
    warps: int
    shared: int


def parameters() -> dict[str, dict[str, str]]:
    """Arguments of every entry point, as the manifest has them."""
    return {kernel.entry.name: dict(kernel.entry.parameters) for kernel in KERNELS}


def recipe(kernel: Kernel, archive: Archive) -> str:
    """sha256 of all that a kernel is compiled from, the versions of triton and of its assemblers
    aside, whatever the line ends of the checkout."""
    modules = {kernel.entry.module, *_IMPORTED.get(kernel.entry.module, ())}
    source = b"".join((_SOURCES / f"{name}.py").read_bytes() for name in sorted(modules))
    ptx = PTX_VERSION if archive.arch == PTX_ARCH else None
    config, arguments = kernel.config(archive.arch), kernel.entry.parameters
    divisors = [divisor(kernel, name, type_) for name, type_ in arguments]
    how = (kernel.types, arguments, divisors, kernel.constants(), config, *archive, ptx)
    return hashlib.sha256(source.replace(b"\r\n", b"\n") + repr(how).encode()).hexdigest()


class Prebuilt:
    """A folder of archives with their manifest, as ``kernels/build.py`` writes it."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    @cached_property
    def manifest(self) -> dict[str, Any]:
        path = self.folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PrebuiltError(f"no readable manifest of the prebuilt kernels: {error}") from error
        expected = (FORMAT, [TILE.q, TILE.k], parameters())
        if tuple(manifest.get(key) for key in ("format", "tile", "parameters")) != expected:
            raise PrebuiltError(f"{path} belongs to another version; run kernels/build.py")
        return manifest

    def archive(self, capability: int, driver: int) -> str:
        """Name of the archive for a compute capability (major * 10 + minor) and a driver (its
        branch, as 570); :class:`PrebuiltError` says why there is none.

        Machine code for exactly this card, of several the one for the newest drivers; PTX, if the
        card is newer than the PTX and has no machine code.
        """
        archives: dict[str, Any] = self.manifest["archives"]
        fitting = {n: a for n, a in archives.items() if n != "ptx" and a["arch"] == capability}
        if not fitting and "ptx" in archives and capability > PTX_ARCH:
            fitting = {"ptx": archives["ptx"]}
        if not fitting:
            raise PrebuiltError(f"no prebuilt kernel for compute capability {capability / 10}")
        taken = {name: a["driver"] for name, a in fitting.items() if a["driver"] <= driver}
        if not taken:
            needed = min(a["driver"] for a in fitting.values())
            raise PrebuiltError(f"needs NVIDIA driver {needed} or newer, here is {driver}")
        return max(taken, key=lambda name: taken[name])

    def arch(self, archive: str) -> int:
        """The compute capability that an archive was compiled for."""
        return int(self.manifest["archives"][archive]["arch"])

    def driver(self, archive: str) -> int:
        """The oldest driver (its branch) that takes an archive."""
        return int(self.manifest["archives"][archive]["driver"])

    def read(self, archive: str, kernel: Kernel) -> Code:
        """The code of one kernel, refused unless its sha256 is the manifest's."""
        try:
            entry = self.manifest["archives"][archive]["kernels"][kernel.name]
            suffix = ".ptx" if archive == "ptx" else ".cubin"
            with zipfile.ZipFile(self.folder / f"{archive}.zip") as members:
                image = members.read(kernel.name + suffix)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise PrebuiltError(f"kernel {kernel.name} of {archive} is missing: {error}") from error
        if hashlib.sha256(image).hexdigest() != entry["sha256"]:
            raise PrebuiltError(
                f"kernel {kernel.name} of {archive} isn't the one in the manifest (sha256 "
                "differs); install LiteAttention again"
            )
        return Code(image, entry["warps"], entry["shared"])
