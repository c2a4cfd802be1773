"""Bits, moves and comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import TYPES, Mask, Operands, Operation, assign, ufunc

_COMPARISONS: dict[str, Any] = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal},
    **{"gt": np.greater, "ge": np.greater_equal},
}


def logic(function: np.ufunc, boolean: np.ufunc) -> Callable[[Operands], Operation]:
    """``and``, ``or``, ``xor``, of bits and of predicates."""

    def make(o: Operands) -> Operation:
        kind = o.parts[-1]
        d, a, b = o.target(o[0], kind), o.source(o[1], kind), o.source(o[2], kind)
        return ufunc(boolean if kind == "pred" else function, d, a, b)

    return make


def invert(o: Operands) -> Operation:
    """``not``."""
    kind = o.parts[-1]
    d, a = o.target(o[0], kind), o.source(o[1], kind)
    return ufunc(np.logical_not if kind == "pred" else np.invert, d, a)


def lop3(o: Operands) -> Operation:
    """Any function of three bits, as a table of its eight values."""
    if o.i.op != "lop3.b32":
        raise o.unknown()
    d, table = o.target(o[0], "b32"), int(o[4].rstrip("U"), 0)
    sources = [o.source(x, "b32") for x in o.i.operands[1:4]]
    shape = np.zeros(o.m.threads, np.uint32)

    def compute() -> np.ndarray:
        a, b, c = (x | shape for x in sources)
        out = shape.copy()
        for n in range(8):
            if table >> n & 1:
                wanted = ((a, 4), (b, 2), (c, 1))
                out |= np.bitwise_and.reduce([x if n & bit else ~x for x, bit in wanted])
        return out

    return assign(d, compute)


def shift(o: Operands) -> Operation:
    """``shl``, ``shr``: amounts beyond the width count as the width."""
    kind, left = o.parts[-1], o.parts[0] == "shl"
    width, type_ = int(kind[1:]), TYPES[kind]
    d, a, b = o.target(o[0], kind), o.source(o[1], kind), o.source(o[2], "u32")
    function = np.left_shift if left else np.right_shift
    if not isinstance(b, np.ndarray):
        if b < width:
            return ufunc(function, d, a, type_.type(b))
        b = np.full(o.m.threads, b)

    def compute() -> np.ndarray:
        moved = function(a, np.minimum(b, width - 1).astype(type_))
        if kind[0] == "s" and not left:
            return moved
        return np.where(b >= width, type_.type(0), moved)

    return assign(d, compute)


def bfe(o: Operands) -> Operation:
    """Bits ``length`` from ``place`` on, constants both."""
    kind = o.parts[-1]
    width, type_ = int(kind[1:]), TYPES[kind]
    if not (isinstance(o[2], str) and o[2].isdigit() and o[3].isdigit()):
        raise o.unknown()
    place, length = int(o[2]), int(o[3])
    if not (length > 0 and place + length <= width):
        raise o.unknown()
    d, a = o.target(o[0], kind), o.source(o[1], kind)
    up, down = type_.type(width - length - place), type_.type(width - length)
    return assign(d, lambda: (a << up) >> down)


def prmt(o: Operands) -> Operation:
    """Any four of the eight bytes of two registers; the selector's upper bits: their signs."""
    if o.i.op != "prmt.b32":
        raise o.unknown()
    d, a, b, selector = (o.source(x, "b32") for x in o.i.operands)
    threads = np.arange(o.m.threads)

    def compute() -> np.ndarray:
        both = (np.broadcast_to(b, d.shape).astype(np.uint64) << np.uint64(32)) | a
        octets = np.ascontiguousarray(both).view(np.uint8).reshape(-1, 8)
        chosen = np.broadcast_to(selector, d.shape)
        out = np.empty((len(octets), 4), np.uint8)
        for n in range(4):
            nibble = chosen >> np.uint32(4 * n) & np.uint32(15)
            octet = octets[threads, nibble & 7]
            out[:, n] = np.where(nibble & 8, np.where(octet >> 7, 0xFF, 0), octet)
        return out.view(np.uint32).ravel()

    return assign(d, compute)


def signs(o: Operands) -> Operation:
    """``abs``, ``neg`` of two 16-bit floats in a register: their upper bits."""
    if o.parts[-1] not in ("bf16x2", "f16x2") or len(o.parts) != 2:
        raise o.unknown()
    d, a = o.target(o[0], "b32"), o.source(o[1], "b32")
    if o.parts[0] == "abs":
        return assign(d, lambda: a & np.uint32(0x7FFF7FFF))
    return assign(d, lambda: a ^ np.uint32(0x80008000))


def mov(o: Operands) -> Operation:
    """Whole registers, one into several, several into one."""
    if isinstance(o[0], list):
        return _split(o)
    if isinstance(o[1], list):
        return _join(o)
    kind = o.parts[-1]
    d, a = o.target(o[0], kind), o.source(o[1], kind)

    def copy(mask: Mask) -> None:
        if mask is True:
            d[:] = a
        else:
            np.copyto(d, a, where=mask)

    return copy


def _split(o: Operands) -> Operation:
    kind, threads = o.parts[-1], o.m.threads
    piece = f"b{int(kind[1:]) // len(o[0])}"
    a = np.asarray(o.source(o[1], kind))
    targets = [None if x == "_" else o.target(x, piece) for x in o[0]]

    def split(mask: Mask) -> None:
        pieces = np.broadcast_to(a, (threads,)).copy().view(TYPES[piece]).reshape(threads, -1)
        for n, target in enumerate(targets):
            if target is not None:
                np.copyto(target, pieces[:, n], where=mask)

    return split


def _join(o: Operands) -> Operation:
    kind = o.parts[-1]
    piece = f"b{int(kind[1:]) // len(o[1])}"
    pieces = [o.source(x, piece) for x in o[1]]

    def join() -> np.ndarray:
        out = np.empty((o.m.threads, len(pieces)), TYPES[piece])
        for n, value in enumerate(pieces):
            out[:, n] = value
        return out.view(TYPES[kind]).ravel()

    return assign(o.target(o[0], kind), join)


def setp(o: Operands) -> Operation:
    if len(o.parts) != 3 or isinstance(o[0], list):
        raise o.unknown()
    compare, kind = o.parts[1:]
    d, a, b = o.target(o[0], "pred"), o.source(o[1], kind), o.source(o[2], kind)
    if compare in _COMPARISONS:
        if kind[0] == "f" and compare == "ne":  # of numbers only
            return assign(d, lambda: (a < b) | (a > b))
        return ufunc(_COMPARISONS[compare], d, a, b)
    if kind[0] != "f":
        raise o.unknown()
    if compare == "num":
        return assign(d, lambda: ~(np.isnan(a) | np.isnan(b)))
    if compare == "nan":
        return assign(d, lambda: np.isnan(a) | np.isnan(b))
    if compare[:-1] in _COMPARISONS and compare[-1] == "u":  # or where one is no number
        ordered = _COMPARISONS[compare[:-1]]
        return assign(d, lambda: ordered(a, b) | np.isnan(a) | np.isnan(b))
    raise o.unknown()


def selp(o: Operands) -> Operation:
    kind = o.parts[-1]
    d, a, b = o.target(o[0], kind), o.source(o[1], kind), o.source(o[2], kind)
    chosen = o.source(o[3], "pred")
    return assign(d, lambda: np.where(chosen, a, b))
