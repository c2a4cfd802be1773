"""Scores -> next live bits -> lists, on the card: two small kernels, one program a query tile.

Bit for bit what ``policy.next_live`` with ``tiles.pack``, and ``tiles.make_lists``, give: those are
their twins. The map stays packed, one bit a tile, and is read and written once. **No GPU has run
this yet.**
"""

# ruff: noqa: N803 - compile-time arguments are capitals, as is the custom in Triton

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mark_tiles(
    live,  # [B, H, Tq, W] int32, contiguous, bits as in tiles.py; not looked at without HAS_LIVE
    score,  # [B, H, Tq, Tk] float32, contiguous
    pinned,  # [Tq, Tk] bytes, contiguous: 0 or 1
    threshold,  # [] float32
    following,  # [B, H, Tq, W] int32, contiguous: the next live bits
    tq,
    tk,
    words,  # W = ceil(Tk / 32)
    HAS_LIVE: tl.constexpr,  # False: all tiles are live
    WORDS: tl.constexpr,  # words at once
):
    """Grid ``(B * H * Tq, 1)``."""
    row = tl.program_id(0).to(tl.int64)
    score += row * tk
    pinned += row % tq * tk
    live += row * words
    following += row * words
    limit = tl.load(threshold)
    w = tl.arange(0, WORDS)
    bit = tl.arange(0, 32)

    # The first of the best tiles; one whose score is not a number is the best of all.
    best, best_score = 0, float("-inf")
    for start in range(0, words, WORDS):
        tiles = (start + w)[:, None] * 32 + bit[None, :]
        s = tl.load(score + tiles, mask=tiles < tk, other=float("-inf"))
        s = tl.where(s == s, s, float("inf"))
        top = tl.max(tl.max(s, 1), 0)
        first = tl.min(tl.min(tl.where(s == top, tiles, 2147483647), 1), 0)
        best = tl.where(top > best_score, first, best)
        best_score = tl.maximum(best_score, top)

    for start in range(0, words, WORDS):
        tiles = (start + w)[:, None] * 32 + bit[None, :]
        inside = tiles < tk
        s = tl.load(score + tiles, mask=inside, other=0.0)
        negligible = s <= limit
        if HAS_LIVE:
            before = tl.load(live + start + w, mask=start + w < words, other=0)
            negligible |= (before[:, None] >> bit[None, :]) & 1 == 0
        stays = tl.load(pinned + tiles, mask=inside, other=0) != 0
        kept = inside & ((negligible == 0) | stays | (tiles == best))
        word = tl.sum(kept.to(tl.int32) << bit[None, :], 1)
        tl.store(following + start + w, word, mask=start + w < words)


@triton.jit
def list_tiles(
    live,  # [B, H, Tq, W] int32, contiguous
    backwards,  # [] byte: not 0 where live tiles are visited in descending order; ALTERNATE only
    count,  # [B, H, Tq] int32, contiguous
    index,  # [B, H, Tq, Tk] int32, contiguous: live tiles, then the others
    tk,
    words,
    ALTERNATE: tl.constexpr,
    WORDS: tl.constexpr,  # words at once
):
    """Grid ``(B * H * Tq, 1)``."""
    row = tl.program_id(0).to(tl.int64)
    live += row * words
    index += row * tk
    t = tl.arange(0, WORDS * 32)
    total = 0
    for start in range(0, words * 32, WORDS * 32):
        total += tl.sum(bits_at(live, start + t, tk), 0)
    tl.store(count + row, total)
    seen = 0  # live tiles before these
    for start in range(0, words * 32, WORDS * 32):
        tiles = start + t
        set_ = bits_at(live, tiles, tk)
        upto = seen + tl.cumsum(set_, 0)
        place = upto - 1
        if ALTERNATE:
            place = tl.where(tl.load(backwards) != 0, total - upto, place)
        place = tl.where(set_ != 0, place, total + tiles - upto)
        tl.store(index + place, tiles, mask=tiles < tk)
        seen += tl.sum(set_, 0)


@triton.jit
def bits_at(live, tiles, tk):
    """0 or 1 for each tile, 0 beyond the end."""
    word = tl.load(live + tiles // 32, mask=tiles < tk, other=0)
    return (word >> tiles % 32) & 1
