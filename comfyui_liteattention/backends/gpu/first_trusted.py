"""Several ways to run the kernel on one card: the first that passes its self-test.

Prebuilt code may fail where the same kernel, compiled on the spot, works: an old driver, a card
newer than the code. Which one it is, is decided for each head_dim and dtype when they are first
used, and stays. Where memory was lacking for a test, that stays for a run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...tiles import TileLists, TileShape
from ..base import Attended, Backend, Criterion, TileMap
from ..kernel_selftest import NO_MEMORY
from ..pooled import Agreement, Pooled
from . import launches

log = logging.getLogger(__name__)


class Candidate(Backend, Protocol):
    """A backend that runs the kernel."""

    def untrusted(self, number: int, head_dim: int, dtype: torch.dtype) -> str | None:
        """Why the kernel isn't trusted on the card of this number, or None: tested once."""
        ...


class FirstTrusted:
    """See :class:`~.base.Backend`. The candidates, best first, have the same tiles."""

    running_scores = True

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._candidates = tuple(candidates)
        #: The candidates in use; before the first call the one that will be tried first.
        self.name = candidates[0].name
        self._chosen: dict[tuple[int, int, torch.dtype], int | str] = {}

    def tile_shape(self, head_dim: int) -> TileShape:
        return self._candidates[0].tile_shape(head_dim)

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        reason = launches.unsupported(q, k, v)
        if reason is not None:
            return reason
        choice = self._choose(launches.card_number(q.device), q.shape[-1], q.dtype)
        return choice if isinstance(choice, str) else self._candidates[choice].unsupported(q, k, v)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lists: TileLists | None = None,
        criterion: Criterion | None = None,
        order: Tensor | None = None,
    ) -> Attended:
        return self._trusted(q).forward(q, k, v, scale, lists, criterion, order)

    def add_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        factor: Tensor,
        order: Tensor | None = None,
    ) -> None:
        self._trusted(q).add_skipped(kept, q, pooled, scale, live, factor, order)

    def audit_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        full: Attended,
        audited: range,
        order: Tensor | None = None,
    ) -> Agreement:
        trusted = self._trusted(q)
        return trusted.audit_skipped(kept, q, pooled, scale, live, full, audited, order)

    def begin_run(self) -> None:
        """Let what memory was lacking for be tried again."""
        chosen = [*self._chosen.items()]
        self._chosen = {key: choice for key, choice in chosen if choice != NO_MEMORY}

    def tile_map(self, device: torch.device) -> TileMap | None:
        maps = (candidate.tile_map(device) for candidate in self._candidates)
        return next((found for found in maps if found is not None), None)

    def _trusted(self, q: Tensor) -> Candidate:
        choice = self._choose(launches.card_number(q.device), q.shape[-1], q.dtype)
        if isinstance(choice, str):
            raise RuntimeError(f"no kernel is trusted: {choice}")
        return self._candidates[choice]

    @torch.compiler.assume_constant_result
    def _choose(self, number: int, head_dim: int, dtype: torch.dtype) -> int | str:
        """Place of the candidate for this, or why there is none."""
        key = (number, head_dim, dtype)
        if key not in self._chosen:
            self._chosen[key] = self._first_trusted(*key)
            used = sorted({c for c in self._chosen.values() if isinstance(c, int)})
            self.name = " and ".join(self._candidates[place].name for place in used or [0])
        return self._chosen[key]

    def _first_trusted(self, number: int, head_dim: int, dtype: torch.dtype) -> int | str:
        reasons: list[str] = []
        for place, candidate in enumerate(self._candidates):
            reason = candidate.untrusted(number, head_dim, dtype)
            if reason == NO_MEMORY:
                return reason  # the next would need as much
            if reason is None:
                if reasons:
                    log.warning("LiteAttention uses %s: %s", candidate.name, "; ".join(reasons))
                return place
            reasons.append(f"{candidate.name}: {reason}")
        return "; ".join(reasons)
