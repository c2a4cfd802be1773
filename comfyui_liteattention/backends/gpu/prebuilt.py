"""Prebuilt kernels on NVIDIA cards: loaded through the driver, launched on torch's stream.

No compiler, no triton, no extension module. A kernel is read from its archive when it is first
needed, compared with the manifest, tried on a small problem and only then trusted, once per
process, card, head_dim and dtype. **No GPU has run this yet**; the tests use a stand-in for the
driver.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from ..base import Qk
from . import launches
from .archive import Prebuilt, PrebuiltError
from .driver import ArgumentBlock, Driver, DriverError, Loaded
from .kernel_table import DTYPES, HEAD_DIMS, KERNELS, TILE, TRAILING_POINTERS, Kernel, Variant


class PrebuiltLauncher:
    """Loaded kernels of every card of this process. Safe to use from several threads."""

    name = "cuda"
    tile = TILE

    def __init__(self, prebuilt: Prebuilt | None = None, driver: Driver | None = None) -> None:
        self._prebuilt = prebuilt or Prebuilt()
        self._given_driver = driver
        self._arguments = {
            entry.name: ArgumentBlock([t for _, t in entry.parameters] + ["*"] * TRAILING_POINTERS)
            for entry in {kernel.entry for kernel in KERNELS}
        }
        self._kernels: dict[tuple[int, Kernel], Loaded] = {}
        self._loading = threading.Lock()

    @functools.cached_property
    def _driver(self) -> Driver:
        return self._given_driver or Driver()

    def missing(self, device: torch.device, qk: Qk = "native") -> str | None:
        """Why nothing prebuilt runs on this card, or None."""
        if torch.version.hip is not None:
            return "prebuilt kernels are for NVIDIA cards, this torch is for AMD"
        try:
            capability = _capability(device)
            archive = self._prebuilt.archive(capability)
            if archive is None:
                return f"no prebuilt kernel for compute capability {capability / 10}"
            probe = Variant(HEAD_DIMS[0], DTYPES[0], False, None, qk)
            if not self._prebuilt.has(archive, probe):
                return f"no prebuilt {qk} kernel for compute capability {capability / 10}"
            self._driver  # noqa: B018 - opened here, so that a missing driver has a reason
        except (DriverError, PrebuiltError) as error:
            return str(error)
        return None

    def launch(self, launch: launches.Launch, device: torch.device) -> None:
        """Launch on the current stream of the card that holds the tensors."""
        number = launches.card_number(device)
        loaded = self._kernels.get((number, launch.kernel)) or self._load(number, launch.kernel)
        values = [_value(a) for a in launch.arguments]
        block = self._arguments[launch.kernel.entry.name]
        pointers = block.fill(values + [0] * TRAILING_POINTERS)
        stream = torch.cuda.current_stream(device).cuda_stream
        self._driver.launch(loaded, launch.grid, stream, pointers)

    def _load(self, number: int, kernel: Kernel) -> Loaded:
        with self._loading:
            if (number, kernel) not in self._kernels:
                capability = _capability(torch.device("cuda", number))
                archive = self._prebuilt.archive(capability)
                if archive is None:
                    raise PrebuiltError(f"no prebuilt kernel for capability {capability / 10}")
                code = self._prebuilt.read(archive, kernel)
                self._kernels[number, kernel] = self._driver.load(
                    number, code.image, kernel.entry.name, code.warps, code.shared
                )
            return self._kernels[number, kernel]


@functools.cache
def process_launcher() -> PrebuiltLauncher:
    """The process's launcher: what is loaded serves every run."""
    return PrebuiltLauncher()


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _value(argument: Tensor | int | float | None) -> int | float:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument
