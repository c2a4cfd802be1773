"""The tile map kept on the card: ``triton_tile_map``'s kernels as functions.

Optional: a backend that has them offers ``tile_map(device)``, a :class:`TileMap` or None. Without
it ``policy.next_live``, ``tiles.pack`` and ``tiles.make_lists`` do the same, bit for bit, with more
and longer passes over memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..tiles import TileLists, all_live, make_lists, pack, unpack
from .cuda_variants import LIST_TILES, MARK_TILES, MapKernel
from .kernel_call import Launch
from .kernel_selftest import lacks_memory, with_room

log = logging.getLogger(__name__)


class TileMap:
    """``launch`` runs a kernel on the card that holds its tensors."""

    def __init__(self, launch: Callable[[Launch, torch.device], None]) -> None:
        self._launch = launch

    def next_live(
        self, live: Tensor | None, score: Tensor, threshold: float | Tensor, pinned: Tensor
    ) -> Tensor:
        """``tiles.pack`` of ``policy.next_live``: bits ``[B, H, Tq, ceil(Tk/32)]`` int32.

        Takes what that takes, but ``live`` in bits as well (None: all); ``score [B, H, Tq, Tk]``
        and a ``threshold []`` float32, ``pinned [Tq, Tk]`` bool. Nothing waits for the card.
        """
        b, h, tq, tk = score.shape
        words = -(-tk // 32)
        if live is not None and live.shape != (b, h, tq, words):
            raise ValueError(f"bits {tuple(live.shape)} don't fit scores {tuple(score.shape)}.")
        if pinned.shape != (tq, tk):
            raise ValueError(f"pinned {tuple(pinned.shape)} doesn't fit {(tq, tk)} tiles.")
        limit = torch.as_tensor(threshold, dtype=torch.float32, device=score.device)
        following = score.new_empty((b, h, tq, words), dtype=torch.int32)
        before = None if live is None else live.contiguous()
        arguments = (
            *(before, score.contiguous(), pinned.contiguous().view(torch.uint8), limit, following),
            *(tq, tk, words),
        )
        kernel = MapKernel(MARK_TILES, live is not None)
        self._launch(Launch(kernel, (b * h * tq, 1), arguments), score.device)
        return following

    def make_lists(self, live: Tensor, tk: int, alternate: bool = False) -> TileLists:
        """``tiles.make_lists`` of ``tiles.unpack``, from bits ``[B, H, Tq, ceil(Tk/32)]`` int32."""
        b, h, tq, words = live.shape
        if words != -(-tk // 32):
            raise ValueError(f"bits {tuple(live.shape)} aren't those of {tk} key tiles.")
        count = live.new_empty(b, h, tq)
        index = live.new_empty(b, h, tq, tk)
        backwards = (live != all_live(1, 1, 1, tk, live.device)).any() if alternate else None
        arguments = (
            *(live.contiguous(), None if backwards is None else backwards.view(torch.uint8)),
            *(count, index, tk, words),
        )
        kernel = MapKernel(LIST_TILES, alternate)
        self._launch(Launch(kernel, (b * h * tq, 1), arguments), live.device)
        return TileLists(count, index)


class TileMaps:
    """The tile map of each card, or None where its self-test fails; tested once."""

    def __init__(self, launch: Callable[[Launch, torch.device], None]) -> None:
        self._map = TileMap(launch)
        self._found: dict[torch.device, TileMap | None] = {}

    def of(self, device: torch.device) -> TileMap | None:
        if torch.compiler.is_compiling():
            return None  # a compiler makes its own kernels, from what it can look into
        if device not in self._found:
            reason = failure(self._map, device)
            if reason is not None:
                log.warning("LiteAttention keeps its tile map with torch: %s", reason)
            self._found[device] = None if reason is not None else self._map
        return self._found[device]


def failure(tile_map: TileMap, device: torch.device) -> str | None:
    """Why the kernels aren't trusted on this card, or None. Only a lack of memory is raised: torch
    would need more of it."""
    try:
        return with_room(partial(problem, tile_map, device))
    # Whatever a driver or a compiler throws: torch does the same, and the user sees why.
    except Exception as error:
        if lacks_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        return f"self-test of the tile map failed: {type(error).__name__}: {error}"


def problem(tile_map: TileMap, device: torch.device) -> str | None:
    """What is wrong with the kernels' results on this card, or None. Many tiles, few tiles, a
    score that is not a number, ties; both orders."""
    random = torch.Generator("cpu").manual_seed(0)  # as all below, whatever torch's default is
    for shape in ((1, 2, 3, 1100), (2, 1, 2, 33)):
        tk = shape[-1]
        score = -torch.randint(0, 9, shape, generator=random, device="cpu").float()
        score[0, 0, 1, 7] = torch.nan
        before = torch.rand(shape, generator=random, device="cpu") < 0.7
        pinned = torch.rand(shape[2:], generator=random, device="cpu") < 0.1
        best = torch.nn.functional.one_hot(score.argmax(-1), tk).bool()
        for mask in (before, torch.ones_like(before)):
            kept = (mask & ~(score <= -4)) | best | pinned
            live, scored, always = (x.to(device) for x in (pack(mask), score, pinned))
            bits = tile_map.next_live(live, scored, -4, always)
            if not torch.equal(unpack(bits.cpu(), tk), kept):
                return "self-test of the tile map: other tiles are kept"
            for alternate in (False, True):
                got = tile_map.make_lists(live, tk, alternate)
                want = make_lists(mask, alternate)
                pairs = ((got.count, want.count), (got.index, want.index))
                if not all(torch.equal(a.cpu(), b) for a, b in pairs):
                    return "self-test of the tile map: other lists"
    return None
