"""What works beside the attention kernel: q, k and v in fewer bits, the skipped tiles' means."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import (
    Attended,
    Inputs,
    Mode,
    Skipped,
    empty_out,
    pick,
    rows_of,
)
from comfyui_liteattention.backends.gpu import qk_int8, scaled_values
from comfyui_liteattention.backends.gpu.kernel_table import HEAD_DIMS, TILE
from comfyui_liteattention.backends.pooled import means_of, pool, skipped_part
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import make_lists, pack

from ..card import Card
from ..cases import Case
from ..problems import DTYPES, LAYOUTS, problem, random_mask, shuffled
from ..truth import UNIT


def quantised(card: Card) -> Iterator[Case]:
    """Queries and keys in 8 bits, number by number."""
    dims = [d for d, mode in card.kinds() if mode == "int8"]
    cases = product(dims, DTYPES.values(), ((300, 470), (1, 1), (65, 64)), LAYOUTS[:4])
    for n, (d, dtype, lengths, layout) in enumerate(cases):
        call = problem((2, 2), lengths, d, dtype, layout, n)
        if n % 5 == 0:
            call.q[0, 0, 0], call.k[0, 0, :] = 0, call.k[0, 0, :1]  # nothing but zeros
        order = shuffled(lengths[1]) if n % 2 else None
        yield Case(f"d{d} {dtype} {lengths} {layout}", partial(quantise, card, call, order))


def quantise(card: Card, call: Inputs, order: Tensor | None) -> list[str]:
    """What is wrong with the quantised numbers of one call."""
    card.backends["int8"].in_order(call, order, means=True)
    mean = qk_int8.mean_key(call.k)
    queries = qk_int8.quantise_queries(call.q, mean, call.scale)
    listed = call.k if order is None else call.k[:, :, order]
    keys = qk_int8.quantise_keys(listed, mean, TILE.k)
    problems = check_means(card, "quantise_keys", listed)
    for entry, want in (("quantise_queries", queries), ("quantise_keys", keys)):
        got = card.launcher.last[entry]
        values, unit = got["values"], got["unit"]
        assert isinstance(values, Tensor) and isinstance(unit, Tensor)
        # What keys have in common is taken off: the rest has the last bit of the whole.
        whole = call.q if entry == "quantise_queries" else call.k
        last_bit = 2.0**-22 * whole.float().abs().max() * whole.shape[-1] ** 0.5
        unit, steps = unit[..., : whole.shape[2]], want.unit[..., : whole.shape[2]]
        if ((unit - steps).abs() > 1e-6 * steps + last_bit).any():
            problems.append(f"{entry}: units off by {((unit - steps).abs() / steps).max():.1e}")
        off = (values * unit.unsqueeze(-1) - want.values * steps.unsqueeze(-1)).abs()
        otherwise = off > qk_int8.LARGEST * 1e-6 * steps.unsqueeze(-1) + last_bit
        if (off > 1.01 * steps.unsqueeze(-1) + last_bit).any() or otherwise.float().mean() > 1e-3:
            problems.append(f"{entry}: {otherwise.sum()} differ, by {off.max():.1e}")
    shift = card.launcher.last["quantise_queries"]["shift"]
    assert isinstance(shift, Tensor)
    off = (shift - queries.shift).abs().max().item()
    if not off < 1e-5 * (1 + queries.shift.abs().max()):
        problems.append(f"shift off by {off:.1e}")
    return problems


def check_means(card: Card, entry: str, listed: Tensor) -> list[str]:
    """What is wrong with the means of the key tiles."""
    got, want = card.launcher.last[entry]["means"], means_of(listed.double(), TILE.k)
    assert isinstance(got, Tensor)
    size = means_of(listed.double().abs(), TILE.k)
    least = 2.0**-25 if got.dtype == torch.float16 else 0.0  # half of the smallest number
    off = (got.double() - want).abs()
    allowed = UNIT[got.dtype] * want.abs() + 1e-6 * size + least
    return [f"{entry}: means off by {off.max():.1e}"] if (off > allowed).any() else []


def scaled(card: Card) -> Iterator[Case]:
    """Values in fp16 and e4m3, number by number; an empty channel, one with large and small."""
    modes = [(d, mode) for d, mode in card.kinds() if mode != "native"] or card.kinds()
    cases = product(modes, DTYPES.values(), ((1, 470), (1, 1), (1, 64)), LAYOUTS[:4])
    for n, ((d, mode), dtype, lengths, layout) in enumerate(cases):
        call = problem((2, 2), lengths, d, dtype, layout, n)
        if card.method(mode, call).values == "own":
            continue
        call.v[..., 7] = 0
        call.v[..., 9] *= torch.logspace(-4, 0, lengths[1])
        order = shuffled(lengths[1]) if n % 2 else None
        check = partial(scale, card, mode, call, order)
        yield Case(f"{mode} d{d} {dtype} {lengths} {layout}", check)


def scale(card: Card, mode: Mode, call: Inputs, order: Tensor | None) -> list[str]:
    """What is wrong with the scaled values of one call."""
    card.backends[mode].in_order(call, order, means=True)
    values = card.method(mode, call).values
    listed = call.v if order is None else call.v[:, :, order]
    want = scaled_values.scale_values(listed, values, TILE.k)
    got = card.launcher.last["scale_values"]
    numbers, unit = got["values"], got["unit"]
    assert isinstance(numbers, Tensor) and isinstance(unit, Tensor)
    problems, off = (
        check_means(card, "scale_values", listed),
        (unit - want.unit).abs() / want.unit,
    )
    if not off.max() < (1e-6 if values == "e4m3" else 1e-30):
        problems.append(f"units off by {off.max():.1e}")
    other = numbers.float() != want.values.float()
    # A quotient's last bit may decide what is nearest.
    if other.float().mean() > (2e-3 if values == "e4m3" else 0):
        problems.append(f"{other.sum()} of {other.numel()} differ")
    return problems


class Means(NamedTuple):
    """A call whose skipped tiles have means: as the card has it, and in float64."""

    call: Inputs
    mask: Tensor
    kept: Attended
    here: Skipped
    wide: Skipped


def tail(card: Card) -> Iterator[Case]:
    """Few tiles and more than are read at once; nothing skipped, all skipped."""
    sizes = (((2, 2), (300, 470)), ((1, 2), (129, 65)), ((1, 1), (1, 1)), ((1, 1), (150, 4483)))
    for n, (d, short, (heads, lengths)) in enumerate(product(HEAD_DIMS, DTYPES, sizes)):
        for name, check in (("add_skipped", add_skipped), ("audit_skipped", audit_skipped)):

            def run(check=check, d=d, short=short, heads=heads, lengths=lengths, n=n) -> list[str]:  # type: ignore[no-untyped-def]
                call = problem(heads, lengths, d, DTYPES[short], LAYOUTS[n % 2], n)
                order = shuffled(lengths[0]) if n % 2 else None
                return check(card, means(call._replace(order=order), n), n)

            yield Case(f"{name} d{d} {short} {lengths}", run)


def means(call: Inputs, n: int) -> Means:
    """Some tiles skipped; by ``n`` none of the first query tile's, or all of the last one's."""
    mask = random_mask(call, 0.5, n)
    if n % 3 == 0:
        mask[..., 0, :] = True
    if n % 4 == 0 and mask.shape[-1] > 1:
        mask[0, 0, -1] = False
    wide = Inputs(*(x.double() for x in call[:3]), call.scale, call.order)
    kept = ReferenceBackend(TILE).forward(wide, make_lists(mask))
    # Rows without a tile give no number in the reference, zeros in the kernels.
    kept = Attended(kept.out.nan_to_num(0).to(call.q.dtype), kept.lse.float(), None)
    pooled, rest = pool(call.k, call.v, TILE.k), (call.scale, pack(mask), call.order)
    doubled = pooled._replace(keys=pooled.keys.double(), values=pooled.values.double())
    skipped = Skipped(call.q, pooled, *rest), Skipped(wide.q, doubled, *rest)
    return Means(call, mask, kept, *skipped)


def add_skipped(card: Card, means: Means, n: int) -> list[str]:
    """What is wrong with a result to which the means were added."""
    call, mask, kept, here, wide = means
    b, h, lq = call.q.shape[:3]
    factor = torch.rand(b, h, generator=torch.Generator().manual_seed(n)) * 2
    factor[0, 0] = 0.0 if n % 2 and b * h > 1 else 1.0
    got = kept._replace(out=empty_out(call.q).copy_(kept.out))
    want = kept._replace(out=kept.out.double())
    card.backends["native"].add_skipped(got, here, factor)
    ReferenceBackend(TILE).add_skipped(want, wide, factor)
    # Shares are rounded before they are multiplied, the result when it is stored.
    rows = torch.arange(lq) if call.order is None else call.order
    sizes = wide.pooled._replace(values=wide.pooled.values.abs())
    part = skipped_part(wide.q[:, :, rows], sizes, call.scale, mask, TILE.q)
    weight = torch.sigmoid(part.lse + factor.double().log().unsqueeze(-1) - kept.lse[:, :, rows])
    size = (weight.nan_to_num(0).unsqueeze(-1) * part.out)[:, :, rows.argsort()]
    allowed = UNIT[call.q.dtype] * (size + want.out.abs()) * 1.05 + 1e-5
    if call.q.dtype == torch.float16:
        allowed = allowed + 2.0**-25 * sizes.values.sum(2, keepdim=True)
    error = ((got.out.double() - want.out).abs() / allowed).max().item()
    problems = [] if error <= 1 else [f"out: {error:.2f} times what rounding allows"]
    same = mask.all(-1).repeat_interleave(TILE.q, 2)[:, :, :lq]  # rows with nothing skipped
    if (got.out != kept.out)[:, :, rows][same].any():
        problems.append("rows with nothing skipped have changed")
    return problems


def audit_skipped(card: Card, means: Means, n: int) -> list[str]:
    """What is wrong with what an audit finds."""
    call, mask, kept, here, wide = means
    audited = range(min(1, mask.shape[2] - 1), mask.shape[2])
    rows = rows_of(audited, TILE, call.order)
    some = Inputs(wide.q[:, :, rows], call.k.double(), call.v.double(), call.scale)
    full = ReferenceBackend(TILE).forward(some)
    there = empty_out(pick(call.q, rows)).copy_(full.out)
    got = kept._replace(out=empty_out(call.q).copy_(kept.out))
    on_card = Attended(there, full.lse.float(), None)
    sums = card.backends["native"].audit_skipped(got, here, on_card, audited)
    want, truth = (x._replace(out=x.out.double()) for x in (got, on_card))
    wanted = ReferenceBackend(TILE).audit_skipped(want, wide, truth, audited)
    problems = []
    for name, a, w in zip(("agreement", "power"), sums, wanted, strict=True):
        bad = (a.double() - w).abs() > 0.02 * w.abs() + 1e-4 * wanted.power.abs() + 1e-4
        if bad.any() or (a.isnan() != w.isnan()).any():
            problems.append(f"{name}: {a.tolist()}, want {w.tolist()}")
    return problems
