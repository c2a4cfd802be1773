"""The kernels as a backend, whoever launches them. **No GPU has run this yet.**"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...tiles import TileLists, TileShape
from .. import kernel_selftest
from ..base import (
    Agreement,
    Attended,
    Backend,
    Criterion,
    Inputs,
    Qk,
    Rows,
    Skipped,
    TileMap,
    one_after_the_other,
)
from . import launches
from .launches import Launch
from .tile_map import TileMaps


class Launcher(Protocol):
    """One way to get a kernel onto a card: prebuilt.py, jit.py."""

    #: What backends with this launcher are called.
    name: str
    tile: TileShape

    def missing(self, device: torch.device, qk: Qk) -> str | None:
        """Why no kernel of this kind can be launched on a device, or None."""
        ...

    def launch(self, launch: Launch, device: torch.device) -> None:
        """Launch on the current stream of the card that holds the tensors."""
        ...


class KernelBackend:
    """See :class:`~..base.Backend` and :class:`~..base.Provider`. One object serves all cards."""

    running_scores = True

    def __init__(self, launcher: Launcher, qk: Qk = "native") -> None:
        self.qk = qk
        self.name = launcher.name if qk == "native" else f"{launcher.name}, {qk}"
        self.launcher = launcher
        self._verdicts = kernel_selftest.Verdicts()
        self._maps = TileMaps(launcher.launch)

    def tile_shape(self, head_dim: int) -> TileShape:
        return self.launcher.tile

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend can't work on a device at all, or None."""
        if device.type != "cuda":
            return f"tensors on {device.type}, not on a graphics card"
        return self.launcher.missing(device, self.qk)

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return launches.CONSTRAINTS.check(q, k, v)

    def provide(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend | str:
        reason = self.unavailable(device)
        return reason or self._verdicts.of(self, head_dim, dtype, device, self.qk) or self

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        prepared = launches.prepare(call, lists, criterion, self.launcher.tile, self.qk)
        for launch in prepared.launches:
            self.launcher.launch(launch, call.q.device)
        return prepared.finish()

    def forward_and_audit(
        self, call: Inputs, lists: TileLists | None, criterion: Criterion | None, audited: Rows
    ) -> tuple[Attended, Attended]:
        return one_after_the_other(self, call, lists, criterion, audited)

    def add_skipped(self, kept: Attended, skipped: Skipped, factor: Tensor) -> None:
        launch = launches.prepare_skipped(kept, skipped, factor, self.launcher.tile)
        self.launcher.launch(launch, skipped.q.device)

    def audit_skipped(
        self, kept: Attended, skipped: Skipped, full: Attended, audited: range
    ) -> Agreement:
        launch, sums = launches.prepare_audit(kept, skipped, full, audited, self.launcher.tile)
        self.launcher.launch(launch, skipped.q.device)
        return launches.agreement(sums)

    def tile_map(self, device: torch.device) -> TileMap | None:
        return self._maps.of(device)
