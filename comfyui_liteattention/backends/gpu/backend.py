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
    Mode,
    Pooled,
    Skipped,
    TileMap,
)
from ..pooled import PoolingBackend
from . import launches
from .kernel_table import NATIVE, Method
from .launch import DTYPE_NAMES, Launch
from .narrow import narrow
from .tile_map import TileMaps


class Launcher(Protocol):
    """One way to get a kernel onto a card: prebuilt.py, jit.py."""

    #: What backends with this launcher are called.
    name: str
    tile: TileShape
    #: What its attention kernels can score.
    criteria: tuple[Criterion | None, ...]

    def missing(self, device: torch.device, mode: Mode) -> str | None:
        """Why no kernel of this kind can be launched on a device, or None."""
        ...

    def method(self, device: torch.device, mode: Mode, head_dim: int, dtype: str) -> Method | None:
        """How a card multiplies in a mode it isn't :meth:`missing`, or None where there is no
        kernel."""
        ...

    def launch(self, launch: Launch, device: torch.device) -> None:
        """Launch on the current stream of the card that holds the tensors."""
        ...


class KernelBackend(PoolingBackend):
    """See :class:`~..base.Backend` and :class:`~..base.Provider`. One object serves all cards."""

    running_scores = True

    def __init__(self, launcher: Launcher, mode: Mode = "native", why: str = "") -> None:
        self.mode = mode
        parts = (launcher.name, "" if mode == "native" else mode, why)
        self.name = ", ".join(filter(None, parts))
        self.launcher, self.tile = launcher, launcher.tile
        self._verdicts = kernel_selftest.Verdicts()
        self._maps = TileMaps(launcher.launch)

    def tile_shape(self, head_dim: int) -> TileShape:
        return self.tile

    def unavailable(self, device: torch.device, criterion: Criterion) -> str | None:
        """Why this backend can't work on a device with this score at all, or None."""
        if device.type != "cuda":
            return f"tensors on {device.type}, not on a graphics card"
        if criterion not in self.launcher.criteria:
            return f"the {criterion} criterion is not among the prebuilt kernels"
        return self.launcher.missing(device, self.mode)

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return launches.CONSTRAINTS.check(q, k, v)

    def provide(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend | str:
        method = self.launcher.method(device, self.mode, head_dim, DTYPE_NAMES[dtype])
        if method is None:
            return f"no {self.mode} kernel for head_dim {head_dim}"
        trial = kernel_selftest.Trial(head_dim, dtype, device, method, self.launcher.criteria)
        return self._verdicts.of(self, trial) or self

    def begin_run(self) -> None:
        """Let what failed for a passing reason be tried again."""
        self._verdicts.begin_run()

    def in_order(
        self, call: Inputs, order: Tensor | None, means: bool
    ) -> tuple[Inputs, Pooled | None]:
        method = self._method(call.q)
        if method == NATIVE:
            return super().in_order(call, order, means)
        narrowed, pooled, launches = narrow(call, order, method, self.tile, means)
        for launch in launches:
            self.launcher.launch(launch, call.q.device)
        return call._replace(order=order, narrowed=narrowed), pooled

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        return self._forward(call, lists, criterion, range(0)).finish()

    def forward_and_audit(
        self, call: Inputs, lists: TileLists, criterion: Criterion | None, audited: range
    ) -> tuple[Attended, Attended]:
        made = self._forward(call, lists, criterion, audited)
        return made.finish(), made.full

    def _forward(
        self, call: Inputs, lists: TileLists | None, criterion: Criterion | None, audited: range
    ) -> launches.Call:
        method = self._method(call.q)
        made = launches.prepare(call, lists, criterion, self.tile, method, audited)
        for launch in made.launches:
            self.launcher.launch(launch, call.q.device)
        return made

    def _method(self, q: Tensor) -> Method:
        found = self.launcher.method(q.device, self.mode, q.shape[3], DTYPE_NAMES[q.dtype])
        if found is None:
            raise ValueError(f"no {self.mode} kernel for head_dim {q.shape[3]}")
        return found

    def add_skipped(self, kept: Attended, skipped: Skipped, factor: Tensor) -> None:
        launch = launches.prepare_skipped(kept, skipped, factor, self.tile)
        self.launcher.launch(launch, skipped.q.device)

    def audit_skipped(
        self, kept: Attended, skipped: Skipped, full: Attended, audited: range
    ) -> Agreement:
        launch, sums = launches.prepare_audit(kept, skipped, full, audited, self.tile)
        self.launcher.launch(launch, skipped.q.device)
        return launches.agreement(sums)

    def tile_map(self, device: torch.device) -> TileMap | None:
        return self._maps.of(device)
