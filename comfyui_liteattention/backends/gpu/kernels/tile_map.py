"""Scores -> a threshold that holds the budget -> next live bits -> lists, on the card.

``backends/tile_map.py`` has the twins in plain PyTorch, many small launches where these are four;
the map stays packed, one bit a tile. **No GPU has run this yet.**
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
    limit,  # [] float32: tiles whose score is at most this go
    all_back,  # [] byte: not 0 where none goes and those that went come back
    following,  # [B, H, Tq, W] int32, contiguous: the next live bits
    tq,
    tk,
    words,  # W = ceil(Tk / 32)
    HAS_LIVE: tl.constexpr,  # False: all tiles are live
    WORDS: tl.constexpr,  # words at once
):
    """``policy.next_live``. Grid ``(B * H * Tq, 1)``."""
    row = tl.program_id(0).to(tl.int64)
    score += row * tk
    pinned += row % tq * tk
    live += row * words
    following += row * words
    highest = tl.load(limit)
    back = tl.load(all_back) != 0
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
        negligible = s <= highest
        if HAS_LIVE:
            before = tl.load(live + start + w, mask=start + w < words, other=0)
            negligible |= (before[:, None] >> bit[None, :]) & 1 == 0
        stays = tl.load(pinned + tiles, mask=inside, other=0) != 0
        kept = inside & ((negligible == 0) | stays | (tiles == best) | back)
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
    """``tiles.make_lists``. Grid ``(B * H * Tq, 1)``."""
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


@triton.jit
def count_scores(
    live,  # [B, H, Tq, W] int32, contiguous; not looked at without HAS_LIVE
    score,  # [B, H, Tq, Tk] float32, contiguous
    pinned,  # [Tq, Tk] bytes, contiguous: 0 or 1
    counts,  # [BINS] int64, added to
    tq,
    tk,
    words,
    HAS_LIVE: tl.constexpr,  # False: all tiles are live
    WORDS: tl.constexpr,  # words at once
    PER_LOG2: tl.constexpr,  # bins
    BINS: tl.constexpr,
    PADDED_BINS: tl.constexpr,  # the next power of two, larger than BINS
):
    """``allocation.histogram``. Grid ``(B * H * Tq, 1)``."""
    row = tl.program_id(0).to(tl.int64)
    score += row * tk
    pinned += row % tq * tk
    live += row * words
    t = tl.arange(0, WORDS * 32)
    b = tl.arange(0, PADDED_BINS)
    found = tl.zeros([PADDED_BINS], tl.int32)
    for start in range(0, words * 32, WORDS * 32):
        tiles = start + t
        inside = tiles < tk
        s = tl.load(score + tiles, mask=inside, other=0.0)
        counted = (tl.load(pinned + tiles, mask=inside, other=1) == 0) & (s == s)
        if HAS_LIVE:
            counted &= bits_at(live, tiles, tk) != 0
        place = BINS + tl.minimum(tl.maximum(tl.floor(s * PER_LOG2), -BINS), -1).to(tl.int32)
        found += tl.histogram(tl.where(counted, place, BINS), PADDED_BINS)
    tl.atomic_add(counts + b, found.to(tl.int64), mask=(found > 0) & (b < BINS), sem="relaxed")


@triton.jit
def choose_limit(
    counts,  # [BINS] int64: from count_scores
    mass,  # [BINS] float64: of a tile of each bin
    ledger,  # [4] float64: bound, measured, expected, audits
    lost,  # [] float32: the loss that this call's audit has measured; not looked at with audited 0
    others,  # [N, 1 + BINS] float64, contiguous: the other layers' stocks
    limit,  # [] float32: out
    all_back,  # [] byte: out: not 0 where the layer starts over
    after,  # [4 + 1 + BINS] float64: out: the ledger, then this layer's stock
    query_tiles,
    audited,  # 0 or 1
    layers,  # N
    decay,
    start,
    prior_weight,
    together,  # what all layers may lose on average
    alone,  # what this layer may lose
    too_much,  # what is too much for all
    too_much_alone,
    PER_LOG2: tl.constexpr,
    BINS: tl.constexpr,
    PADDED_BINS: tl.constexpr,
):
    """``allocation.choose``. Grid ``(1, 1)``."""
    b = tl.arange(0, PADDED_BINS)
    inside = b < BINS
    held = tl.load(counts + b, mask=inside, other=0) * tl.load(mass + b, mask=inside, other=0.0)
    held = held / query_tiles

    bound = tl.load(ledger)
    measured, expected, audits = tl.load(ledger + 1), tl.load(ledger + 2), tl.load(ledger + 3)
    if audited != 0:
        measured = measured * decay + tl.load(lost)
        expected = expected * decay + bound
        audits = audits * decay + 1
    prior = prior_weight * expected / tl.maximum(audits, 1.0)
    ratio = (measured + start * prior + 1e-12) / (expected + prior + 1e-12 / start)

    mine = ratio * held
    theirs_spent = tl.zeros([1], tl.float64)
    theirs = tl.zeros([PADDED_BINS], tl.float64)
    for _ in range(layers):
        theirs_spent += tl.load(others)
        theirs += tl.load(others + 1 + b, mask=inside, other=0.0)
        others += 1 + BINS
    fits = tl.cumsum(mine + theirs, 0) <= (layers + 1) * together - theirs_spent - ratio * bound
    fits &= tl.cumsum(mine, 0) <= alone - ratio * bound
    bins = tl.sum((fits & inside).to(tl.int32), 0)

    gone = b < bins
    bound += tl.sum(tl.where(gone, held, 0.0), 0)
    now = ratio * bound
    mean = (theirs_spent + now) / (layers + 1)
    fresh = tl.max(((mean > too_much) & (now >= mean)).to(tl.int32), 0) != 0
    fresh |= now > too_much_alone
    # Everything below the first bin that doesn't fit: the number next to its edge.
    edge = ((BINS - bins) * (-1.0 / PER_LOG2)).to(tl.int32, bitcast=True) + 1
    tl.store(limit, edge.to(tl.float32, bitcast=True))
    tl.store(all_back, fresh.to(tl.uint8))
    tl.store(after, tl.where(fresh, 0.0, bound))
    tl.store(after + 1, measured)
    tl.store(after + 2, expected)
    tl.store(after + 3, audits)
    tl.store(after + 4, tl.where(fresh, 0.0, now))
    tl.store(after + 5 + b, tl.where(gone, 0.0, mine), mask=inside)
