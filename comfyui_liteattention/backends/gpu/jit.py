"""The same kernel compiled on the spot, for cards without prebuilt code: needs triton.

On Linux triton also needs a C compiler at run time; on Windows the package ``triton-windows``.
AMD cards have tiles of their own. **Untested**: compiled for AMD, but run on no GPU yet.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...tiles import TileShape
from ..base import Mode
from .kernel_table import (
    ADD_SKIPPED,
    ARCHS,
    ATTEND,
    AUDIT_SKIPPED,
    CRITERIA,
    METHODS,
    TILE,
    Config,
    Entry,
    Kernel,
    Method,
    method,
)
from .launch import Launch, capability

#: AMD architecture prefix -> (tile, warps, stages), from compiled registers only.
AMD = {
    "gfx9": (TileShape(128, 64), Config(4, 1)),  # Instinct
    "gfx1": (TileShape(64, 32), Config(4, 1)),  # Radeon: 128 x 64 spills hundreds of registers
}
_NEAREST = 80  # configurations of an NVIDIA card that isn't in the table


class JitLauncher:
    """Compiles a kernel when it is first launched."""

    name = "triton"
    criteria = CRITERIA

    def __init__(self) -> None:
        self._amd = _amd_setting()
        self.tile = self._amd[0] if self._amd else TILE

    def missing(self, device: torch.device, mode: Mode) -> str | None:
        """Why nothing can be compiled for this card, or None."""
        if importlib.util.find_spec("triton") is None:
            return "triton isn't installed"
        if _known(device) not in METHODS[mode]:
            return f"no {mode} for this compute capability: it would be slower"
        return None

    def method(self, device: torch.device, mode: Mode, head_dim: int, dtype: str) -> Method | None:
        return method(mode, _known(device), head_dim, dtype)

    def launch(self, launch: Launch, device: torch.device) -> None:
        config = self._config(launch.kernel, device)
        # A kernel doesn't look at pointers that its variant leaves out, but triton wants tensors.
        anything = next(a for a in launch.arguments if isinstance(a, Tensor))
        arguments = [anything if a is None else a for a in launch.arguments]
        with torch.cuda.device(device):
            for_any_size(launch.kernel.entry)[launch.grid](
                *arguments,
                **launch.kernel.constants(self.tile),
                num_warps=config.warps,
                num_stages=config.stages,
            )

    def _config(self, kernel: Kernel, device: torch.device) -> Config:
        if self._amd and kernel.entry in (ATTEND, ADD_SKIPPED, AUDIT_SKIPPED):
            return self._amd[1]
        return kernel.config(_known(device)) or kernel.config(_NEAREST) or Config(4, 1)


def _known(device: torch.device) -> int:
    """The compute capability of a card, or one that the table knows and that does as well."""
    if torch.version.hip is not None:
        return _NEAREST
    arch = capability(device)
    return arch if arch in ARCHS else _NEAREST


def source(entry: Entry) -> Any:
    """The Triton function of an entry point."""
    return getattr(importlib.import_module(f".kernels.{entry.module}", __package__), entry.name)


@cache
def for_any_size(entry: Entry) -> Any:
    """The Triton function of an entry point, compiled once for all sizes. Triton itself would
    compile anew, in the middle of a run, for sizes that are 1 or multiples of 16; strides, of which
    that is worth knowing, are so at any size."""
    import triton

    return triton.jit(source(entry).fn, do_not_specialize=sizes(entry))


def sizes(entry: Entry) -> list[str]:
    """The parameters that are numbers of heads, tokens, tiles, words."""
    whole = (name for name, type_ in entry.parameters if type_ == "i32")
    return [name for name in whole if not name.endswith("_row")]


def _amd_setting() -> tuple[TileShape, Config] | None:
    """Tile and configuration of the AMD card in this machine, or None if there is none."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_properties(0).gcnArchName
    return next((setting for prefix, setting in AMD.items() if name.startswith(prefix)), None)
