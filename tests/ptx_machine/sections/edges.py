"""At the edges of what kernels are promised: addresses, padding, numbers that are none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Inputs, Mode, Skipped
from comfyui_liteattention.backends.gpu.kernel_table import HEAD_DIMS, TILE, Method
from comfyui_liteattention.backends.gpu.launches import CONSTRAINTS
from comfyui_liteattention.backends.pooled import pool
from comfyui_liteattention.tiles import TileLists, make_lists, pack

from ..card import Card
from ..cases import Case
from ..global_memory import lazy_zeros
from ..problems import moved, problem, random_mask, shuffled
from ..truth import multiplied, one_step, reference, wide
from .attention import attend, listed, rounded_alike


def refused(card: Card) -> Iterator[Case]:
    """What the kernels can't take is refused. What comes through all the same, the machine sees."""
    call = problem((1, 2), (130, 130), 64, torch.bfloat16, "heads first")
    q, k, v = call[:3]
    check = replace(CONSTRAINTS, device="cpu").check
    for by, place in product((1, 2, 4, 7), range(3)):
        odd = [moved(x, by) if n == place else x for n, x in enumerate((q, k, v))]
        name = f"{'qkv'[place]} {2 * by} bytes off"
        yield Case(name, partial(_says, check, odd, "multiple of 16"))
    for pad in (1, 2, 4, 12):
        odd = [torch.randn(1, 2, 130, 64 + pad).bfloat16()[..., :64], k, v]
        yield Case(f"rows {64 + pad} apart", partial(_says, check, odd, "multiples of 8"))
    far_off = torch.randn(1, 2, 130, 66).bfloat16()[..., :64]
    for name, x in (("4 bytes off", moved(q, 2)), ("rows 66 apart", far_off)):
        yield Case(f"forced through, {name}", partial(_misaligned, card, call._replace(q=x)))
    # A stride of a dimension of size 1 is never used, whatever it is.
    for d, mode in card.kinds():
        one = [torch.randn(d).bfloat16().as_strided((1, 1, 1, d), (3, 5, 7, 1)) for _ in range(3)]
        call = Inputs(*one, d**-0.5)
        yield Case(f"{mode} d{d} odd strides", partial(attend, card, mode, call, None, "mass"))


def _says(check, tensors: list[Tensor], words: str) -> list[str]:  # type: ignore[no-untyped-def]
    reason = check(*tensors)
    return [] if reason is not None and words in reason else [str(reason)]


def _misaligned(card: Card, call: Inputs) -> list[str]:
    card.backends["native"].forward(call)
    found = card.take_findings()
    return [] if any("global misaligned" in finding for finding in found) else ["not noticed"]


def unaligned(card: Card) -> Iterator[Case]:
    """Lists, orders, bits, factors, LSEs start anywhere: nothing promises more than their dtype."""
    for n, (d, mode) in enumerate(card.kinds()):
        call = problem((1, 2), (300, 300), d, torch.bfloat16, "tokens first", n)
        lists = make_lists(random_mask(call, 0.6, n))
        lists = TileLists(moved(lists.count, 1), moved(lists.index, 1))
        call = call._replace(order=moved(shuffled(300), 1))
        yield Case(f"{mode} d{d} lists", partial(attend, card, mode, call, lists, "mass"))
    for d in HEAD_DIMS:
        yield Case(f"d{d} tail", partial(_unaligned_tail, card, d))


def _unaligned_tail(card: Card, d: int) -> list[str]:
    call = problem((1, 2), (300, 300), d, torch.bfloat16, "tokens first", d)
    call = call._replace(order=shuffled(300))
    mask, backend = random_mask(call, 0.5, d), card.backends["native"]
    rows = call.order[128:256]
    kept = backend.forward(call, make_lists(mask))
    full = backend.forward(call._replace(q=call.q[:, :, rows], order=None))
    kept, full = (x._replace(lse=moved(x.lse, 1)) for x in (kept, full))
    means = pool(call.k, call.v, TILE.k)
    skipped = Skipped(call.q, means, call.scale, moved(pack(mask), 1), moved(call.order, 1))
    backend.audit_skipped(kept, skipped, full, range(1, 2))
    backend.add_skipped(kept, skipped, moved(torch.ones(1, 2), 1))
    return []


def padding(card: Card) -> Iterator[Case]:
    """The rest of a row of the lists is padding that nobody reads: garbage there does no harm."""
    values = (2**31 - 1, -(2**31), -1, 10**6)
    for n, ((d, mode), garbage) in enumerate(product(card.kinds(), values)):
        call = problem((1, 2), (300, 470), d, torch.bfloat16, "tokens first", n)
        mask = random_mask(call, 0.5, n)
        mask[0, 0, 1] = False  # an empty row
        mask[0, 1, 1] = True
        lists, places = make_lists(mask), torch.arange(mask.shape[-1])
        index = torch.where(places < lists.count.unsqueeze(-1), lists.index, garbage).int()
        odd = TileLists(lists.count, index)
        run = partial(attend, card, mode, call, odd, "mass", clean=lists)
        yield Case(f"{mode} d{d} padding {garbage}", run)


def not_numbers(card: Card) -> Iterator[Case]:
    """A NaN or infinity in q, k or v spoils the rows that it spoils in the reference, no others; a
    tile that isn't visited spoils nothing."""
    values = (math.nan, math.inf, -math.inf)
    for n, ((d, mode), value, where) in enumerate(product(card.kinds(), values, range(3))):
        for lists in (False, True):
            run = partial(_spoilt, card, mode, d, (value, where, lists), n)
            yield Case(f"{mode} d{d} {value} in {'qkv'[where]}, lists {lists}", run)


def _spoilt(card: Card, mode: Mode, d: int, what: tuple[float, int, bool], seed: int) -> list[str]:
    value, where, with_lists = what
    clean = problem((1, 2), (140, 200), d, torch.bfloat16, "tokens first", seed)
    tensors = [x.clone() for x in clean[:3]]
    tensors[where][0, 1, 70, 3] = value  # of key tile 1
    call = Inputs(*tensors, clean.scale)
    mask = torch.ones(1, 2, *TILE.grid(140, 200), dtype=torch.bool)
    if with_lists:
        mask[0, 1, 1, 1] = False  # the second query tile doesn't visit it
    lists = listed(mask) if with_lists else None
    method = card.method(mode, call)
    got, truth = card.backends[mode].forward(call, lists, "mass"), reference(method)
    spoilt = ~truth.forward(wide(call, method), lists).out.isfinite()
    if with_lists:  # 0 times not a number is none, in the reference
        # What one key or value spoils in 8 bits, others feel: units are for all of them.
        unseen = call._replace(
            k=call.k if method.int8 else clean.k,
            v=call.v if method.values == "e4m3" else clean.v,
        )
        spoilt[0, 1, 128:] = ~truth.forward(wide(unseen, method), lists).out.isfinite()[0, 1, 128:]
    problems = []
    if not torch.equal(~got.out.isfinite(), spoilt):
        rows = (~got.out.isfinite() != spoilt).any(-1).nonzero().tolist()
        problems.append(f"other rows are spoilt: {len(rows)}, first {rows[:3]}")
    assert got.score is not None
    twin = _scores_of_numbers(call, method, mask)
    step = 0.0 if not method.int8 or rounded_alike(card, call) else one_step(call, method)
    near = (got.score == twin) | ((got.score - twin).abs() < 1e-4 + step / math.log(2))
    same = (got.score.isnan() == twin.isnan()) & (twin.isnan() | near)
    if not same.all():
        place = tuple((~same).nonzero()[0].tolist())
        problems.append(f"score {place}: {got.score[place]}, want {twin[place]}")
    return problems


def _scores_of_numbers(call: Inputs, method: Method, mask: Tensor) -> Tensor:
    """Running mass scores, without the rows that are no numbers; ascending order."""
    q, k, scale = multiplied(call, method)
    s = q.double() @ k.double().mT * scale
    score = torch.full(mask.shape, -torch.inf, dtype=torch.float64)
    for b, h, i in product(*map(range, mask.shape[:3])):
        rows = s[b, h, i * TILE.q : (i + 1) * TILE.q]
        total = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        for t in mask[b, h, i].nonzero().ravel().tolist():
            weight = torch.logsumexp(rows[:, t * TILE.k : (t + 1) * TILE.k], 1)
            total = torch.logaddexp(total, weight)
            share = (weight - total) / math.log(2)
            number = ~share.isnan() & (total < torch.inf)
            score[b, h, i, t] = share[number].amax() if number.any() else torch.nan
    return score


def far(card: Card) -> Iterator[Case]:
    """Elements more than 2^31 apart: batches, heads, rows as far apart as is let through."""
    rows = (2**31 // 128 - 1) // 8 * 8  # the largest row stride that isn't refused
    places = ("batches 2^31 + 8", "batches 2^33", "heads 2^31 + 64", f"rows {rows}")
    for n, (place, (d, mode)) in enumerate(product(range(4), card.kinds())):
        lengths = (130, 140) if place == 3 else (140, 200)
        call = problem((2, 2), lengths, d, torch.bfloat16, "heads first", n)
        lists = listed(random_mask(call, 0.7, n) if n % 2 else None)

        def run(place=place, d=d, mode=mode, n=n, call=call, lists=lists) -> list[str]:  # type: ignore[no-untyped-def]
            strides = {
                0: lambda length: (2**31 + 8, length * d, d, 1),
                1: lambda length: (2**33, length * d, d, 1),
                2: lambda length: (2 * (2**31 + 64), 2**31 + 64, d, 1),
                3: lambda length: (d, 2 * d, rows, 1),
            }[place]
            apart = [_far(x, strides(x.shape[2])) for x in call[:3]]
            order = shuffled(call.q.shape[2]) if n % 3 else None
            return attend(card, mode, Inputs(*apart, call.scale, order), lists, "mass")

        yield Case(f"{mode} d{d} {places[place]}", run)


def _far(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Strides for which there is no memory: pages that are never touched take none."""
    steps = zip(values.shape, strides, strict=True)
    size = (sum((n - 1) * s for n, s in steps) + 1) * values.element_size()
    flat = torch.from_numpy(lazy_zeros(size)).view(values.dtype)
    return flat.as_strided(values.shape, strides).copy_(values)
