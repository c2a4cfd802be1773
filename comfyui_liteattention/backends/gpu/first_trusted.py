"""Several ways to run the kernels on one card: the first that passes its self-test.

Prebuilt code may fail where the same kernel, compiled on the spot, works: an old driver, a card
newer than the code. Which one it is, is decided for each head_dim and dtype when they are first
used, and stays; what failed for a reason that may pass, as a lack of memory, is asked again when a
run begins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...tiles import TileShape
from ..base import Backend, Provider
from ..kernel_selftest import NO_MEMORY

log = logging.getLogger(__name__)


class Candidate(Backend, Provider, Protocol):
    """A backend that knows whether it can be trusted."""

    def begin_run(self) -> None:
        """Let what failed for a passing reason be tried again."""
        ...


class FirstTrusted:
    """See :class:`~..base.Provider`. The candidates, best first, have the same tiles and take the
    same tensors."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = tuple(candidates)
        #: The candidates in use; before the first call the one that will be tried first.
        self.name = candidates[0].name
        self._chosen: dict[tuple[torch.device, int, torch.dtype], Backend | str] = {}

    def tile_shape(self, head_dim: int) -> TileShape:
        return self._candidates[0].tile_shape(head_dim)

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return self._candidates[0].unsupported(q, k, v)

    def provide(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend | str:
        key = (device, head_dim, dtype)
        if key not in self._chosen:
            self._chosen[key] = self._first_trusted(*key)
            used = [c.name for c in self._candidates if c in self._chosen.values()]
            self.name = " and ".join(used) or self._candidates[0].name
        return self._chosen[key]

    def begin_run(self) -> None:
        """Let what failed for a passing reason be tried again."""
        for candidate in self._candidates:
            candidate.begin_run()
        best = self._candidates[0]
        self._chosen = {key: one for key, one in [*self._chosen.items()] if one is best}

    def _first_trusted(
        self, device: torch.device, head_dim: int, dtype: torch.dtype
    ) -> Backend | str:
        reasons: list[str] = []
        for candidate in self._candidates:
            found = candidate.provide(device, head_dim, dtype)
            if found == NO_MEMORY:
                return found  # the next would need as much
            if not isinstance(found, str):
                if reasons:
                    log.warning("LiteAttention uses %s: %s", found.name, "; ".join(reasons))
                return found
            reasons.append(f"{candidate.name}: {found}")
        return "; ".join(reasons)
