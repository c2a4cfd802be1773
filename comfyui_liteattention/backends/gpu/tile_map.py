"""The tile map kept on the card: ``kernels/tile_map.py``'s kernels as functions.

Optional: a backend that has them offers ``tile_map(device)``. Without it
``backends/tile_map.py`` does the same, with many small launches in place of a few.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from ...budget import allocation
from ...budget.allocation import BINS, Choice, Limit
from ...budget.ledger import DECAY, PRIOR_WEIGHT
from ...tiles import TileLists, all_live, make_lists, pack, unpack
from ..kernel_selftest import lacks_memory, with_room
from .kernel_table import CHOOSE_LIMIT, COUNT_SCORES, LIST_TILES, MARK_TILES, Entry, MapKernel
from .launch import Launch

log = logging.getLogger(__name__)


class TileMapKernels:
    """See :class:`~.base.TileMap`. ``launch`` runs a kernel on the card that holds its tensors."""

    def __init__(self, launch: Callable[[Launch, torch.device], None]) -> None:
        self._launch = launch

    def next_live(
        self, live: Tensor | None, score: Tensor, limit: float | Limit, pinned: Tensor
    ) -> Tensor:
        b, h, tq, tk = score.shape
        if not isinstance(limit, Limit):
            limit = Limit(score.new_full((), limit), _no(score.device))
        following = score.new_empty((b, h, tq, -(-tk // 32)), dtype=torch.int32)
        rest = (limit.score, limit.all_back.view(torch.uint8), following)
        self._each_query_tile(MARK_TILES, live, score, pinned, *rest)
        return following

    def histogram(self, live: Tensor | None, score: Tensor, pinned: Tensor) -> Tensor:
        counts = score.new_zeros(BINS, dtype=torch.int64)
        self._each_query_tile(COUNT_SCORES, live, score, pinned, counts)
        return counts

    def choose(
        self,
        counts: Tensor,
        query_tiles: int,
        ledger: Tensor,
        lost: Tensor | None,
        start: float,
        others: Sequence[Tensor],
        aim: float,
    ) -> Choice:
        limit = Limit(*(ledger.new_empty((), dtype=x) for x in (torch.float32, torch.bool)))
        after = ledger.new_empty(len(ledger) + 1 + BINS)
        share = allocation.LARGEST_SHARE
        arguments = (
            *(counts, allocation.mass_of_bins(ledger.device)),
            # The kernel wants a pointer in any case; where nothing was audited it doesn't read it.
            *(ledger, limit.score if lost is None else lost.float()),
            torch.stack([*others]) if others else ledger,
            *(limit.score, limit.all_back.view(torch.uint8), after),
            *(query_tiles, int(lost is not None), len(others)),
            *(DECAY, start, PRIOR_WEIGHT, aim, share * aim),
            *(allocation.TOO_MUCH * aim, allocation.TOO_MUCH * share * aim),
        )
        kernel = MapKernel(CHOOSE_LIMIT, False)
        self._launch(Launch(kernel, (1, 1), arguments), ledger.device)
        return Choice(limit, *after.split((len(ledger), 1 + BINS)))

    def _each_query_tile(
        self, entry: Entry, live: Tensor | None, score: Tensor, pinned: Tensor, *rest: Tensor
    ) -> None:
        """Launch a kernel that goes through the scores of each query tile."""
        b, h, tq, tk = score.shape
        words = -(-tk // 32)
        if live is not None and live.shape != (b, h, tq, words):
            raise ValueError(f"bits {tuple(live.shape)} don't fit scores {tuple(score.shape)}.")
        if pinned.shape != (tq, tk):
            raise ValueError(f"pinned {tuple(pinned.shape)} doesn't fit {(tq, tk)} tiles.")
        before = None if live is None else live.contiguous()
        always = pinned.contiguous().view(torch.uint8)
        arguments = (before, score.contiguous(), always, *rest, tq, tk, words)
        kernel = MapKernel(entry, live is not None)
        self._launch(Launch(kernel, (b * h * tq, 1), arguments), score.device)

    def make_lists(self, live: Tensor, tk: int, alternate: bool = False) -> TileLists:
        b, h, tq, words = live.shape
        if words != -(-tk // 32):
            raise ValueError(f"bits {tuple(live.shape)} aren't those of {tk} key tiles.")
        count = live.new_empty(b, h, tq)
        index = live.new_empty(b, h, tq, tk)
        backwards = (live != _every(tk, live.device)).any() if alternate else None
        arguments = (
            *(live.contiguous(), None if backwards is None else backwards.view(torch.uint8)),
            *(count, index, tk, words),
        )
        kernel = MapKernel(LIST_TILES, alternate)
        self._launch(Launch(kernel, (b * h * tq, 1), arguments), live.device)
        return TileLists(count, index)


@lru_cache(maxsize=8)
def _every(tk: int, device: torch.device) -> Tensor:
    """Bits of a row of live tiles."""
    return all_live(1, 1, 1, tk, device)


@lru_cache(maxsize=8)
def _no(device: torch.device) -> Tensor:
    """``[]`` bool: not all tiles come back."""
    return torch.zeros((), dtype=torch.bool, device=device)


class TileMaps:
    """The tile map of each card, or None where its self-test fails; tested once."""

    def __init__(self, launch: Callable[[Launch, torch.device], None]) -> None:
        self._map = TileMapKernels(launch)
        self._found: dict[torch.device, TileMapKernels | None] = {}

    def of(self, device: torch.device) -> TileMapKernels | None:
        if device not in self._found:
            reason = failure(self._map, device)
            if reason is not None:
                log.warning("LiteAttention keeps its tile map with torch: %s", reason)
            self._found[device] = None if reason is not None else self._map
        return self._found[device]


def failure(tile_map: TileMapKernels, device: torch.device) -> str | None:
    """Why the kernels aren't trusted on this card, or None. Only a lack of memory is raised: torch
    would need more of it."""
    try:
        return with_room(partial(problem, tile_map, device))
    # Whatever a driver or a compiler throws: torch does the same, and the user sees why.
    except Exception as error:
        if lacks_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        return f"self-test of the tile map failed: {type(error).__name__}: {error}"


def problem(tile_map: TileMapKernels, device: torch.device) -> str | None:
    """What is wrong with the kernels' results on this card, or None. Many tiles, few tiles, a
    score that is not a number, ties; both orders; a budget with another layer and without."""
    random = torch.Generator("cpu").manual_seed(0)  # as all below, whatever torch's default is
    for shape in ((1, 2, 3, 1100), (2, 1, 2, 33)):
        tk = shape[-1]
        score = -torch.randint(0, 9, shape, generator=random, device="cpu").float()
        score[0, 0, 1, 7] = torch.nan
        before = torch.rand(shape, generator=random, device="cpu") < 0.7
        pinned = torch.rand(shape[2:], generator=random, device="cpu") < 0.1
        best = torch.nn.functional.one_hot(score.argmax(-1), tk).bool()
        scored, always = score.to(device), pinned.to(device)
        for mask, known in ((before, True), (torch.ones_like(before), False)):
            live = pack(mask).to(device)
            bits = live if known else None  # before a layer has marked anything, all are live
            for all_back in (False, True):
                kept = torch.ones_like(mask) if all_back else mask & ~(score <= -4)
                limit = Limit(scored.new_tensor(-4.0), torch.tensor(all_back, device=device))
                following = tile_map.next_live(bits, scored, limit, always)
                if not torch.equal(unpack(following.cpu(), tk), kept | best | pinned):
                    return "self-test of the tile map: other tiles are kept"
            for alternate in (False, True):
                got = tile_map.make_lists(live, tk, alternate)
                want = make_lists(mask, alternate)
                pairs = ((got.count, want.count), (got.index, want.index))
                if not all(torch.equal(a.cpu(), b) for a, b in pairs):
                    return "self-test of the tile map: other lists"
            counts = tile_map.histogram(bits, scored, always)
            want_counts = allocation.histogram(score, mask & ~pinned)
            if not torch.equal(counts.cpu(), want_counts):
                return "self-test of the tile map: other counts"
            if not _chooses_well(tile_map, counts, want_counts, math.prod(shape[:3])):
                return "self-test of the tile map: another choice"
    return None


def _chooses_well(
    tile_map: TileMapKernels, counts: Tensor, want_counts: Tensor, query_tiles: int
) -> bool:
    """Whether choices from ``counts`` on a card are the twin's: alone, beside another layer, and
    where so much is lost that all tiles have to come back."""
    ledger = torch.tensor([0.02, 0.01, 0.03, 2.0], dtype=torch.float64, device="cpu")
    lost = torch.tensor(0.03, device="cpu")
    other = torch.full((1 + BINS,), 1e-4, dtype=torch.float64, device="cpu")

    def made(choose: Callable[..., Choice], counts: Tensor) -> Iterator[Tensor]:
        there = counts.device
        audit, others = lost.to(there), [other.to(there)]
        for audited, beside, aim in ((None, [], 0.2), (audit, others, 0.2), (audit, others, 1e-4)):
            chosen = choose(counts, query_tiles, ledger.to(there), audited, 0.3, beside, aim)
            score, all_back = chosen.limit
            # Where all come back it isn't looked at.
            yield from (score.masked_fill(all_back, 0), all_back, chosen.ledger, chosen.remaining)

    pairs = zip(made(tile_map.choose, counts), made(allocation.choose, want_counts), strict=True)
    return all(_close(got.cpu(), want) for got, want in pairs)


def _close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-9)
