"""The same kernel compiled on the spot, for cards without prebuilt code: needs triton.

On Linux triton also needs a C compiler at run time; on Windows the package ``triton-windows``.
AMD cards have tiles of their own. **Untested**: compiled for AMD, but run on no GPU yet.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..tiles import TileLists, TileShape
from . import kernel_call, kernel_selftest
from .base import Attended, Criterion
from .cuda_variants import CONFIGS, TILE, Config
from .pooled import Pooled, add_skipped

#: AMD architecture prefix -> (tile, warps, stages), from compiled registers only.
AMD = {
    "gfx9": (TileShape(128, 64), Config(4, 1)),  # Instinct
    "gfx1": (TileShape(64, 32), Config(4, 1)),  # Radeon: 128 x 64 spills hundreds of registers
}
_NEAREST = 80  # configurations of an NVIDIA card that isn't in the table


class TritonBackend:
    """See :class:`~.base.Backend`."""

    name = "triton"
    running_scores = True

    def __init__(self) -> None:
        self._verdicts = kernel_selftest.Verdicts()
        self._amd = _amd_setting()

    def tile_shape(self, head_dim: int) -> TileShape:
        return self._amd[0] if self._amd else TILE

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend can't work on a device at all, or None."""
        if device.type != "cuda":
            return f"tensors on {device.type}, not on a graphics card"
        if importlib.util.find_spec("triton") is None:
            return "triton isn't installed"
        return None

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        reason = self.unavailable(q.device) or kernel_call.unsupported(q, k, v)
        return reason or self.untrusted(q.device.index or 0, q.shape[-1], q.dtype)

    @torch.compiler.assume_constant_result
    def untrusted(self, number: int, head_dim: int, dtype: torch.dtype) -> str | None:
        return self._verdicts.of(self, head_dim, dtype, torch.device("cuda", number))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lists: TileLists | None = None,
        criterion: Criterion | None = None,
    ) -> Attended:
        from .triton_kernel import attend_tiles

        tile = self.tile_shape(q.shape[-1])
        call = kernel_call.prepare(q, k, v, scale, lists, criterion, tile)
        config = self._amd[1] if self._amd else _config(q.device, q.shape[-1])
        # The kernel doesn't look at pointers that its variant leaves out, but triton wants tensors.
        arguments = [call.result.lse if a is None else a for a in call.arguments]
        with torch.cuda.device(q.device):
            attend_tiles[call.grid](
                *arguments,
                **call.variant.constants(tile),
                num_warps=config.warps,
                num_stages=config.stages,
            )
        return call.finish()

    def add_skipped(
        self, kept: Attended, q: Tensor, pooled: Pooled, scale: float, live: Tensor, factor: Tensor
    ) -> None:
        add_skipped(kept, q, pooled, scale, live, factor, TILE)


def _amd_setting() -> tuple[TileShape, Config] | None:
    """Tile and configuration of the AMD card in this machine, or None if there is none."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_properties(0).gcnArchName
    return next((setting for prefix, setting in AMD.items() if name.startswith(prefix)), None)


def _config(device: torch.device, head_dim: int) -> Config:
    major, minor = torch.cuda.get_device_capability(device)
    return CONFIGS.get(major * 10 + minor, CONFIGS[_NEAREST])[head_dim]
