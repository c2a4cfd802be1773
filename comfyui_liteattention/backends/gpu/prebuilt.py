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

from ..base import Mode
from .archive import Prebuilt, PrebuiltError
from .driver import ArgumentBlock, Driver, DriverError, ImageRefusedError, Loaded
from .kernel_table import (
    KERNELS,
    METHODS,
    PREBUILT_CRITERIA,
    TILE,
    TRAILING_POINTERS,
    Kernel,
    Method,
    method,
)
from .launch import Launch, capability, card_number


class PrebuiltLauncher:
    """Loaded kernels of every card of this process. Safe to use from several threads."""

    name = "cuda"
    tile = TILE
    criteria = PREBUILT_CRITERIA

    def __init__(self, prebuilt: Prebuilt | None = None, driver: Driver | None = None) -> None:
        self._prebuilt = prebuilt or Prebuilt()
        self._given_driver = driver
        self._arguments = {
            entry.name: ArgumentBlock([t for _, t in entry.parameters] + ["*"] * TRAILING_POINTERS)
            for entry in {kernel.entry for kernel in KERNELS}
        }
        self._archives: dict[int, str] = {}
        self._kernels: dict[tuple[int, Kernel], Loaded] = {}
        self._loading = threading.Lock()

    @functools.cached_property
    def _driver(self) -> Driver:
        return self._given_driver or Driver()

    def missing(self, device: torch.device, mode: Mode) -> str | None:
        """Why nothing prebuilt runs on this card, or None."""
        if torch.version.hip is not None:
            return "prebuilt kernels are for NVIDIA cards, this torch is for AMD"
        try:
            arch = self._prebuilt.arch(self._archive(device))
        except (DriverError, PrebuiltError) as error:
            return str(error)
        if arch not in METHODS[mode]:
            return f"no prebuilt {mode} kernel for compute capability {capability(device) / 10}"
        return None

    def method(self, device: torch.device, mode: Mode, head_dim: int, dtype: str) -> Method | None:
        return method(mode, self._prebuilt.arch(self._archive(device)), head_dim, dtype)

    def launch(self, launch: Launch, device: torch.device) -> None:
        """Launch on the current stream of the card that holds the tensors."""
        number = card_number(device)
        loaded = self._kernels.get((number, launch.kernel)) or self._load(number, launch.kernel)
        values = [_value(a) for a in launch.arguments]
        block = self._arguments[launch.kernel.entry.name]
        pointers = block.fill(values + [0] * TRAILING_POINTERS)
        stream = torch.cuda.current_stream(device).cuda_stream
        self._driver.launch(loaded, launch.grid, stream, pointers)

    def _archive(self, device: torch.device) -> str:
        """What has the code for this card and driver. Asked at every call."""
        number = card_number(device)
        if number not in self._archives:
            found = self._prebuilt.archive(capability(device), self._driver.branch)
            self._archives[number] = found
        return self._archives[number]

    def _load(self, number: int, kernel: Kernel) -> Loaded:
        with self._loading:
            if (number, kernel) not in self._kernels:
                archive = self._archive(torch.device("cuda", number))
                code = self._prebuilt.read(archive, kernel)
                try:
                    loaded = self._driver.load(
                        number, code.image, kernel.entry.name, code.warps, code.shared
                    )
                except ImageRefusedError as error:
                    needed, here = self._prebuilt.driver(archive), self._driver.branch
                    raise ImageRefusedError(
                        f"{error}; {archive} needs NVIDIA driver {needed}, here is {here}"
                    ) from error
                self._kernels[number, kernel] = loaded
            return self._kernels[number, kernel]


@functools.cache
def process_launcher() -> PrebuiltLauncher:
    """The process's launcher: what is loaded serves every run."""
    return PrebuiltLauncher()


def _value(argument: Tensor | int | float | None) -> int | float:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument
