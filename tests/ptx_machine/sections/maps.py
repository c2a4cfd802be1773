"""The tile map's kernels beside their twins in torch: bits, counts, lists and limits bit for bit,
what layers have spent and remaining to 1e-6; the whole of each self-test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from comfyui_liteattention.backends import kernel_selftest, tile_map
from comfyui_liteattention.backends.base import Mode
from comfyui_liteattention.backends.gpu.kernel_table import PREBUILT_CRITERIA, method
from comfyui_liteattention.backends.gpu.tile_map import failure
from comfyui_liteattention.budget import allocation
from comfyui_liteattention.budget.allocation import Limit
from comfyui_liteattention.tiles import pack

from ..card import Card
from ..cases import Case
from ..problems import DTYPES, moved

_SHAPES = (
    *((1, 1, 1, 1), (2, 1, 2, 31), (1, 2, 3, 32), (1, 1, 2, 33), (1, 2, 2, 64)),
    *((1, 1, 1, 1023), (1, 1, 2, 1024), (1, 2, 1, 1025), (2, 2, 3, 65), (1, 1, 2, 2100)),
)
_CPU = torch.device("cpu")


def _edges(score: Tensor, random: torch.Generator) -> Tensor:
    """Of bins, and the numbers next to them."""
    score = (score * 4).round() / 4
    up = torch.rand(score.shape, generator=random)
    score = torch.where(up < 0.3, score.nextafter(torch.tensor(-100.0)), score)
    return torch.where(up > 0.7, score.nextafter(torch.tensor(100.0)), score)


def _some(score: Tensor, random: torch.Generator, share: float, value: float) -> Tensor:
    return score.masked_fill(torch.rand(score.shape, generator=random) < share, value)


_KINDS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "whole": lambda score, random: score.floor(),
    "fine": lambda score, random: score,
    "edges": _edges,
    "minus infinity": lambda score, random: _some(score, random, 0.5, -torch.inf),
    "not a number": lambda score, random: _some(score, random, 0.1, torch.nan),
    "all the same": lambda score, random: torch.full_like(score, -3.0),
    "positive": lambda score, random: score + 20,
}


def tile_maps(card: Card) -> Iterator[Case]:
    """Few tiles and many, kinds of scores, limits of any kind, memory at odd places."""
    random = torch.Generator().manual_seed(1)
    for n, (shape, (kind, change)) in enumerate(product(_SHAPES, _KINDS.items())):
        score = change(-torch.rand(shape, generator=random) * 45, random)
        live = pack(torch.rand(shape, generator=random) < (0.0, 0.6, 1.0)[n % 3])
        pinned = torch.rand(shape[2:], generator=random) < (0.1, 0.0, 0.3, 1.0)[n % 4]
        if n % 2:
            score, pinned, live = moved(score, 1), moved(pinned, 3), moved(live, 1)
        yield Case(f"{shape} {kind}", partial(map_problems, card, score, live, pinned))


def map_problems(card: Card, score: Tensor, live: Tensor, pinned: Tensor) -> list[str]:
    """What is wrong with one map, all kernels."""
    problems, tk = [], score.shape[-1]
    for bits in (live, None):
        limits = (-4.0, -20.25, math.nan, -math.inf, math.inf)
        for limit in (
            *limits,
            *(Limit(torch.tensor(-8.0), torch.tensor(x)) for x in (False, True)),
        ):
            got = card.map.next_live(bits, score, limit, pinned)
            if not torch.equal(got, tile_map.next_live(bits, score, limit, pinned)):
                problems.append(f"mark_tiles: other tiles are kept at {limit}")
        counts = card.map.histogram(bits, score, pinned)
        if not torch.equal(counts, tile_map.histogram(bits, score, pinned)):
            problems.append("count_scores: other counts")
    for alternate in (False, True):
        lists = card.map.make_lists(live, tk, alternate)
        want = tile_map.make_lists(live, tk, alternate)
        if not (torch.equal(lists.count, want.count) and torch.equal(lists.index, want.index)):
            problems.append(f"list_tiles: other lists, alternate {alternate}")
    return problems


def choices(card: Card) -> Iterator[Case]:
    """The budget's threshold. Sums in another order may differ in the last bits of float64."""
    for n in range(60):
        yield Case(f"choose_limit {n}", partial(_choice, card, n))


def _choice(card: Card, n: int) -> list[str]:
    random = torch.Generator().manual_seed(n)
    counts = torch.randint(0, 10 ** (n % 5 + 1), (allocation.BINS,), generator=random)
    counts[torch.rand(allocation.BINS, generator=random) < (0.0, 0.5, 0.97)[n % 3]] = 0
    if n == 7:
        counts.zero_()
    ledger = torch.rand(4, generator=random, dtype=torch.float64)
    ledger *= torch.tensor([0.1, 0.1, 0.1, 5.0]) * (n % 5 > 0)
    lost = None if n % 2 else torch.rand((), generator=random) * 0.1
    others = [
        torch.rand(1 + allocation.BINS, generator=random, dtype=torch.float64) * 1e-3
        for _ in range((0, 1, 3, 17)[n % 4])
    ]
    start, aim = (0.3, 1.0, 0.01)[n % 3], (0.2, 1e-4, 0.02, 1e-8)[n % 4 if n % 7 else 1]
    tiles = int(torch.randint(1, 5000, (), generator=random))
    arguments = (counts, tiles, ledger, lost, start, others, aim)
    got, want = card.map.choose(*arguments), tile_map.choose(*arguments)
    problems = []
    if got.limit.all_back != want.limit.all_back or (
        not want.limit.all_back and got.limit.score != want.limit.score
    ):
        problems.append(f"limit {got.limit}, want {want.limit}")
    for name, a, w in (
        ("ledger", got.ledger, want.ledger),
        ("remaining", got.remaining, want.remaining),
    ):
        if not torch.allclose(a, w, rtol=1e-6, atol=1e-15):  # its constants are float32 there
            problems.append(f"{name}: off by {(a - w).abs().max():.1e}")
    return problems


def selftests(card: Card) -> Iterator[Case]:
    """The project's own, as a card would run them."""
    for (d, mode), short in product(card.kinds(), DTYPES):

        def run(mode: Mode = mode, d: int = d, short: str = short) -> list[str]:
            how = method(mode, card.arch, d, short)
            assert how is not None
            trial = kernel_selftest.Trial(d, DTYPES[short], _CPU, how, PREBUILT_CRITERIA)
            reason = kernel_selftest.judge(card.backends[mode], trial).reason
            return [reason] if reason else []

        yield Case(f"{mode} d{d} {short}", run)
    yield Case("tile map", lambda: [reason] if (reason := failure(card.map, _CPU)) else [])
