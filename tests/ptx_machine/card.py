"""The project's launcher and backend on the machine, which stands in for a card.

They run as they are: argument blocks, driver calls, manifest and hashes. All that is replaced is
what of torch asks for a card, and where PTX comes from that the project doesn't ship.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Inputs, Mode
from comfyui_liteattention.backends.gpu import prebuilt
from comfyui_liteattention.backends.gpu.archive import Code, Prebuilt
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.driver import Driver, DriverError
from comfyui_liteattention.backends.gpu.kernel_table import (
    HEAD_DIMS,
    KERNELS,
    METHODS,
    PTX_ARCH,
    Kernel,
    Method,
    Variant,
    method,
)
from comfyui_liteattention.backends.gpu.launch import DTYPE_NAMES, Argument, Launch
from comfyui_liteattention.backends.gpu.tile_map import TileMapKernels

from .builds import compiled
from .library import MachineLibrary
from .words import POISON

#: Compute capability of a card newer than all archives, which gets the PTX that is shipped.
SHIPPED = 130


class MachinePrebuilt(Prebuilt):
    """The project's archives, with PTX in place of cubins."""

    def read(self, archive: str, kernel: Kernel) -> Code:
        if archive == "ptx":
            return super().read(archive, kernel)
        return compiled(self.arch(archive), kernel)


class MachineLauncher(prebuilt.PrebuiltLauncher):
    """Tells the library which tensors the pointers of a launch stand for."""

    def __init__(self, library: MachineLibrary) -> None:
        super().__init__(MachinePrebuilt(), Driver(library))
        self.library = library
        #: Entry point -> the arguments of its last launch, by name.
        self.last: dict[str, dict[str, Argument]] = {}

    def launch(self, launch: Launch, device: torch.device) -> None:
        self.library.expected = launch
        names = (name for name, _ in launch.kernel.entry.parameters)
        self.last[launch.kernel.entry.name] = dict(zip(names, launch.arguments, strict=True))
        try:
            super().launch(launch, device)
        except DriverError:
            error, self.library.error = self.library.error, None
            raise error or RuntimeError("a driver call failed without a reason") from None


class Card:
    """A card of this compute capability (major * 10 + minor), to be used inside :meth:`there`.

    ``edit``, ``shared_base``: see :class:`MachineLibrary`."""

    def __init__(
        self,
        capability: int = SHIPPED,
        edit: dict[str, Callable[[str], str]] | None = None,
        shared_base: int = 1024,
    ) -> None:
        self.capability = capability
        self.library = MachineLibrary(edit, shared_base)
        self.launcher = MachineLauncher(self.library)
        #: Compute capability that its kernels are made for.
        self.arch = PTX_ARCH if capability == SHIPPED else capability
        self.backends = {
            mode: KernelBackend(self.launcher, mode)
            for mode in METHODS
            if self.arch in METHODS[mode]
        }
        self.map = TileMapKernels(self.launcher.launch)

    @contextmanager
    def there(self) -> Iterator[None]:
        """What of torch asks for a card finds this one. ``new_empty`` gives poison."""
        stream = SimpleNamespace(cuda_stream=0x5EA0)
        with (
            mock.patch.object(prebuilt, "capability", return_value=self.capability),
            mock.patch.object(torch.cuda, "current_stream", return_value=stream),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(Tensor, "new_empty", _poisoned(Tensor.new_empty)),
        ):
            yield

    def take_findings(self) -> list[str]:
        """What the machine has found since the last call."""
        return [str(finding) for finding in self.library.findings.take()]

    def method(self, mode: Mode, call: Inputs) -> Method:
        """How a call is multiplied."""
        found = method(mode, self.arch, call.q.shape[-1], DTYPE_NAMES[call.q.dtype])
        assert found is not None
        return found

    def kinds(self) -> list[tuple[int, Mode]]:
        """Every head_dim with every mode that has kernels for it."""
        pairs = product(HEAD_DIMS, self.backends)
        return [(d, mode) for d, mode in pairs if method(mode, self.arch, d, "bf16")]

    def mode_of(self, variant: Variant) -> Mode | None:
        """The mode in which this card runs a kernel, if it does."""
        asked = (self.arch, variant.head_dim, variant.dtype)
        return next((m for m in self.backends if method(m, *asked) == variant.method), None)

    def not_run(self) -> list[str]:
        """Kernels of this card that nothing has launched."""
        return [k.name for k in KERNELS if k.config(self.arch) and k.name not in self.library.ran]


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Memory that a caller has to fill holds poison."""

    def function(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "cpu" and tensor.numel():
            flat = tensor.view(-1).view(torch.uint8)
            flat.numpy()[:] = np.resize(POISON, len(flat))
        return tensor

    return function
