"""The prebuilt machine code: which archive fits a card, and is it what was built?"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .kernel_table import KERNELS, PTX_ARCH, TILE, Kernel

FOLDER = Path(__file__).parent / "archives"


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
        expected = (2, [TILE.q, TILE.k], parameters())
        if tuple(manifest.get(key) for key in ("format", "tile", "parameters")) != expected:
            raise PrebuiltError(f"{path} belongs to another version; run kernels/build.py")
        return manifest

    def archive(self, capability: int) -> str | None:
        """Name of the archive for a compute capability (major * 10 + minor), or None.

        Machine code for exactly this card, else PTX, if the card is newer than the PTX.
        """
        archives = self.manifest["archives"]
        if f"sm_{capability}" in archives:
            return f"sm_{capability}"
        return "ptx" if "ptx" in archives and capability > PTX_ARCH else None

    def has(self, archive: str, kernel: Kernel) -> bool:
        return kernel.name in self.manifest["archives"][archive]["kernels"]

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
