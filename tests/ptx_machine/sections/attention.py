"""Every attention kernel, and the shapes and layouts that models bring."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import cast

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Criterion, Inputs, Mode, rows_of
from comfyui_liteattention.backends.gpu import qk_int8
from comfyui_liteattention.backends.gpu.kernel_table import KERNELS, TILE, Variant
from comfyui_liteattention.tiles import TileLists, make_lists

from ..card import Card
from ..cases import Case
from ..problems import DTYPES, LAYOUTS, problem, random_mask, shuffled, with_sink
from ..truth import problems_with


def attend(
    card: Card,
    mode: Mode,
    call: Inputs,
    lists: TileLists | None = None,
    criterion: Criterion | None = None,
    clean: TileLists | None = None,
) -> list[str]:
    """What is wrong with one call. ``clean``: the lists for the reference, where it can't take
    those of the kernel."""
    backend = card.backends[mode]
    before = [x.clone() for x in call[:3]]
    got, method = backend.forward(call, lists, criterion), card.method(mode, call)
    alike = not method.int8 or rounded_alike(card, call)
    problems = problems_with(got, call, clean or lists, criterion, method, alike)
    if not all(torch.equal(x, old) for x, old in zip(call[:3], before, strict=True)):
        problems.append("an input was changed")
    return problems


def rounded_alike(card: Card, call: Inputs) -> bool:
    """Whether the last launches have made the numbers in 8 bits that PyTorch makes. (A rotation is
    a sum, whose last bit may decide; section ``quantised`` counts where it does.)"""
    mean = qk_int8.mean_key(call.k)
    wanted = {
        "quantise_queries": qk_int8.quantise_queries(call.q, mean, call.scale),
        "quantise_keys": qk_int8.quantise_keys(call.k, mean, TILE.k),
    }
    made = {entry: card.launcher.last[entry]["values"] for entry in wanted}
    return all(torch.equal(cast(Tensor, made[e]), want.values) for e, want in wanted.items())


def listed(mask: Tensor | None, alternate: bool = False) -> TileLists | None:
    """The lists of a mask, if there is one."""
    return None if mask is None else make_lists(mask, alternate)


def attention(card: Card) -> Iterator[Case]:
    """Each kernel: ragged lengths, several batches and heads, in an order and without."""
    variants = [kernel for kernel in KERNELS if isinstance(kernel, Variant)]
    for n, variant in enumerate(variants):
        d, dtype, mode = variant.head_dim, DTYPES[variant.dtype], card.mode_of(variant)
        if mode is None:
            continue
        criterion = variant.criterion
        call = problem((2, 2), (300, 470), d, dtype, LAYOUTS[n % 2], n)
        mask = random_mask(call, 0.5, n) if variant.lists else None
        if mask is not None:
            mask[1, 0, 1] = False  # an empty row
        if criterion and not variant.method.int8:
            call = with_sink(call)
        elif n % 5 == 0:  # peaks: scores of some thousands
            call = call._replace(q=call.q * 16)
        if n % 4 < 2:
            call = call._replace(order=shuffled(300, n))
        rest = (listed(mask, n % 3 == 0), criterion)
        yield Case(variant.name, partial(attend, card, mode, call, *rest))
        for lengths in ((1, 1), (129, 65)):
            small = problem((1, 1), lengths, d, dtype, "heads first", n)
            mask = random_mask(small, 0.7, n) if variant.lists else None
            run = partial(attend, card, mode, small, listed(mask), criterion)
            yield Case(f"{variant.name} {lengths}", run)


def audits(card: Card) -> Iterator[Case]:
    """Query tiles that are done over all tiles in the same launch: the same bits as in calls of
    their own."""
    for (d, mode), dtype in product(card.kinds(), DTYPES.values()):
        for order in (None, shuffled(300)):
            call = problem((1, 2), (300, 470), d, dtype)._replace(order=order)
            name = f"{mode} d{d} {dtype}, order {order is not None}"
            yield Case(name, partial(_audit, card, mode, call))


def _audit(card: Card, mode: Mode, call: Inputs) -> list[str]:
    backend, lists, audited = card.backends[mode], listed(random_mask(call, 0.5)), range(1, 3)
    assert lists is not None
    got, full = backend.forward_and_audit(call, lists, "mass", audited)
    alone, every = backend.forward(call, lists, "mass"), backend.forward(call)
    rows = rows_of(audited, TILE, call.order)
    problems = [] if torch.equal(got.out, alone.out) else ["the audit changed the result"]
    if not torch.equal(full.out, every.out[:, :, rows]):
        problems.append("audited rows differ from those of a dense call")
    if not torch.allclose(full.lse, every.lse[:, :, rows], rtol=0, atol=1e-5):
        problems.append("their LSEs differ")
    return problems


def shapes(card: Card) -> Iterator[Case]:
    """Lengths around the tile sides, each layout, q, k and v of one memory."""
    lengths = ((1, 64), (127, 1), (128, 64), (5, 129), (128, 191), (257, 192), (2, 193), (130, 321))
    kinds = card.kinds()
    for n, (pair, _) in enumerate(product(lengths, range(2))):
        (d, mode), dtype = kinds[n % len(kinds)], list(DTYPES.values())[n // 3 % 2]
        call = problem((1, 2), pair, d, dtype, LAYOUTS[n % 2], n)
        lists = listed(random_mask(call, 0.6, n) if n % 2 else None)
        yield Case(f"{mode} d{d} {pair}", partial(attend, card, mode, call, lists, "mass"))
    for n, (layout, (d, mode)) in enumerate(product(LAYOUTS, card.kinds())):
        call = problem((2, 2), (150, 150), d, list(DTYPES.values())[n % 2], layout, n)
        lists = listed(random_mask(call, 0.6, n) if n % 3 else None)
        call = call._replace(order=shuffled(150) if n % 2 else None)
        yield Case(f"{mode} d{d} {layout}", partial(attend, card, mode, call, lists, "mass"))
    for d, mode in card.kinds():
        random = torch.Generator().manual_seed(d)
        fused = torch.randn(2, 170, 3, 2, d, generator=random).bfloat16()
        call = Inputs(*(fused[:, :, n].transpose(1, 2) for n in range(3)), d**-0.5)
        yield Case(f"{mode} d{d} of one memory", partial(attend, card, mode, call, None, "mass"))


def many_heads(card: Card) -> Iterator[Case]:
    """The last of 65535 heads; blocks at the ends of the grid only."""
    for d, mode in card.kinds():
        yield Case(f"{mode} d{d}", partial(_ends_of_grid, card, d, mode))


def _ends_of_grid(card: Card, d: int, mode: Mode) -> list[str]:
    heads, random = 65535, torch.Generator().manual_seed(d)
    q, k, v = (torch.randn(1, heads, 1, d, generator=random).bfloat16() for _ in range(3))
    some = [0, 40000, heads - 1]
    card.library.only_blocks = [(0, head) for head in some]
    got = card.backends[mode].forward(Inputs(q, k, v, d**-0.5))
    card.library.only_blocks = None
    off = (got.out[:, some].double() - v[:, some].double()).abs().max().item()
    return [] if off < 0.02 else [f"off by {off}"]


def bases(card: Card) -> Iterator[Case]:
    """Shared memory that starts at a multiple of 16 bytes only, as its declaration says; on Hopper
    elsewhere at a multiple of 1024, which wgmma asks for, and a block's own memory starts so."""
    other = Card(card.capability, shared_base=3072 if card.arch == 90 else 16)
    for (d, mode), dtype in product(card.kinds(), DTYPES.values()):
        call = problem((1, 1), (130, 200), d, dtype, "tokens first", d)

        def run(mode: Mode = mode, call: Inputs = call) -> list[str]:
            return attend(other, mode, call, None, "mass") + other.take_findings()

        yield Case(f"{mode} d{d} {dtype}", run)
