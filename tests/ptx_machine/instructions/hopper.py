"""sm_90's products of large matrices by a warp group, straight from shared memory: ``wgmma``.

Registers get their results when these are waited for. Reads of shared memory count as under way up
to that wait; they are fenced if any ``fence.proxy.async`` by all threads came after the writes.
"""

from __future__ import annotations

import re

import numpy as np

from ..state import Product
from .matrix import FORMATS
from .operands import Mask, Operands, Operation
from .warps import whole_warps

_NAME = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|32)\."
    r"(f32\.bf16\.bf16|f32\.f16\.f16|s32\.s8\.s8|f32\.e4m3\.e4m3)"
)
_UNKNOWN_YET = 0x7FC0DEAD  # in registers whose result is under way: not a number


def fence(o: Operands) -> Operation:
    if o.i.op != "fence.proxy.async.shared::cta":
        raise o.unknown()

    def run(mask: Mask) -> None:
        if mask is not True:
            raise o.unknown("not by all threads together")
        o.m.shared.unfenced.fill(0)

    return run


def wgmma(o: Operands) -> Operation:
    name = o.i.op.removeprefix("wgmma.").removesuffix(".sync.aligned")
    if name == "fence":
        return lambda mask: whole_warps(o, mask)
    if name == "commit_group":
        return lambda mask: _commit(o)
    if name == "wait_group":
        return lambda mask: _wait(o, int(o[0]))
    match = _NAME.fullmatch(o.i.op)
    if match is None or o.m.threads % 128:
        raise o.unknown()
    return _multiply(o, int(match[1]), *match[3].split(".")[:2])


def _commit(o: Operands) -> None:
    o.m.products.groups.append(o.m.products.open)
    o.m.products.open = []


def _wait(o: Operands, keep: int) -> None:
    products = o.m.products
    cut = max(0, len(products.groups) - keep)
    done, products.groups = products.groups[:cut], products.groups[cut:]
    pending = {product.names for group in products.groups for product in group}
    for product in (product for group in done for product in group):
        for source, copy in zip(product.sources, product.copies, strict=True):
            if not np.array_equal(source, copy):
                o.m.findings.add("register changed under a wgmma", o.i, str(product.names[:1]))
        for pin in product.pinned:
            o.m.shared.pinned = [p for p in o.m.shared.pinned if p[0] is not pin]
        if product.names not in pending and product.names in products.held:
            result = products.held.pop(product.names)
            for row, value in zip(product.rows, result, strict=True):
                row[:] = value


def _multiply(o: Operands, n: int, sums: str, kind: str) -> Operation:
    """``d [64, n] = a [64, k] b [k, n] (+ d)``; a from registers or from shared memory."""
    m, i = o.m, o.i
    d, a, b, scale, *flags = o.i.operands
    rows, names = [o.target(x, sums) for x in d], tuple(d)
    if FORMATS[kind].each == 2 and (
        flags[:2] != ["1", "1"] or (isinstance(a, str) and flags[2] != "0")
    ):
        raise o.unknown()
    transposed = FORMATS[kind].each == 2 and flags[-1] == "1"
    sources = [o.source(x, "b32") for x in a] if isinstance(a, list) else []
    left_word = o.source(a, "b64") if isinstance(a, str) else None
    right_word, add = o.source(b, "b64"), o.source(scale, "pred")
    each, read = FORMATS[kind]

    def described(word: np.ndarray, count: int, along: bool, group: int) -> np.ndarray:
        words = np.unique(word[128 * group : 128 * (group + 1)])
        if len(words) != 1:
            m.findings.add("descriptor differs within a warp group", i, str(words[:4]))
        places = _places(o, int(words[0]), count, along, count * 4 // each)
        octets = m.shared.read_by_matrix_unit(i, places, 4 * group)
        values = read(np.ascontiguousarray(octets.reshape(len(places), -1)))
        return values if along else values.T

    def left_of(group: int) -> np.ndarray:
        if left_word is not None:
            return described(left_word, 64, True, group)
        words = np.stack(sources)[:, 128 * group : 128 * (group + 1)]
        left = read(np.ascontiguousarray(words)).reshape(2, 2, 4, 8, 4, each)
        return left.transpose(2, 1, 3, 0, 4, 5).reshape(64, 8 * each)

    def run(mask: Mask) -> None:
        if mask is not True:
            raise o.unknown("not by all threads together")
        pins = len(m.shared.pinned)
        wanted = np.broadcast_to(add, (m.threads,))
        if wanted.any() != wanted.all():
            m.findings.add("scale-d differs", i, "")
        held = m.products.held.get(names)
        before = np.stack(rows) if held is None else held
        out = np.zeros_like(before)
        for group in range(m.threads // 128):
            right = described(right_word, n, not transposed, group)  # [n, k]
            product = (left_of(group) @ right.T).reshape(4, 2, 8, n // 8, 4, 2)
            # (warp, row half, row, columns, thread, neighbour) -> registers, threads
            product = product.transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, 128)
            out[:, 128 * group : 128 * (group + 1)] = product
        if wanted.any():
            out = before + out
        for row in rows:
            row.view(np.uint32)[:] = _UNKNOWN_YET
        m.products.held[names] = out
        pinned = [places for places, _ in m.shared.pinned[pins:]]
        copies = [x.copy() for x in sources]
        m.products.open.append(Product(names, rows, sources, copies, pinned))

    return run


def _places(o: Operands, word: int, rows: int, along: bool, width: int) -> np.ndarray:
    """Offsets ``[rows, pieces of 16 bytes]`` of an operand that a matrix descriptor describes.

    ``along``: 32 bytes of each of ``rows`` rows; else 16 rows of ``width`` bytes (the transposed
    operand, 2 bytes a number)."""
    pitch = {1: 128, 2: 64, 3: 32}.get(word >> 62)
    if pitch is None or word >> 49 & 7:
        raise o.unknown(f"descriptor {word:#x}")
    start, leading, stride = ((word >> n & 0x3FFF) << 4 for n in (0, 16, 32))
    row = np.arange(rows if along else 16)[:, None]
    piece = np.arange(2 if along else width // 16)[None, :] * 16
    address = start + row // 8 * stride + row % 8 * pitch + piece % pitch + piece // pitch * leading
    bits = {128: 7, 64: 3, 32: 1}[pitch]
    address = address ^ ((address >> 7 & bits) << 4)
    return address - o.m.shared.base
