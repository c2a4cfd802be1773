"""Numbers: sums, products, quotients, minima. Names and semantics: PTX ISA 8.8.

Approximate instructions (``ex2``, ``rsqrt``, ``div.full``) are more precise here than on a card.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import TYPES, Mask, Operands, Operation, assign, flush, ufunc

_FLOATS = ("f32", "f64")
#: Several numbers in a register -> the type of one, and how many.
_PACKED_TYPES = {"f32x2": (np.float32, 2), "f16x2": (np.float16, 2)}
_PACKED: dict[str, Any] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply},
    **{"min": np.fmin, "max": np.fmax},
}

_fma64 = ctypes.CDLL(ctypes.util.find_library("m")).fma
_fma64.restype, _fma64.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def binary(function: np.ufunc) -> Callable[[Operands], Operation]:
    """``add``, ``sub``, ``mul``, and ``div`` of floats."""

    def make(o: Operands) -> Operation:
        parts, kind = o.parts, o.parts[-1]
        if parts[-2:] in (["f32", "f16"], ["f32", "bf16"]):
            return _to_wider(function, o)
        if set(parts) - {"rn", "ftz", "lo", "approx", "full", kind, parts[0]}:
            raise o.unknown()
        if kind not in _FLOATS and parts[0] == "mul" and "lo" not in parts:
            raise o.unknown()
        d, a, b = o.target(o[0], kind), o.source(o[1], kind), o.source(o[2], kind)
        if "ftz" in parts:
            return assign(d, lambda: flush(function(flush(a), flush(b))))
        return ufunc(function, d, a, b)

    return make


def _to_wider(function: np.ufunc, o: Operands) -> Operation:
    """``add.f32.bf16`` and the like (PTX 8.6): the first number has 16 bits."""
    if o.parts[1:-2] != ["rn"]:
        raise o.unknown()
    d, b, half = o.target(o[0], "f32"), o.source(o[2], "f32"), o.parts[-1] == "f16"
    a = o.source(o[1], "f16" if half else "u16")

    def wide() -> np.ndarray:
        whole = np.asarray(a)
        if half:
            return whole.astype(np.float32)
        return (whole.astype(np.uint32) << 16).view(np.float32)

    return assign(d, lambda: function(wide(), b))


def _wide(kind: str) -> str:
    return kind[0] + str(2 * int(kind[1:]))


def mul(o: Operands) -> Operation:
    if "wide" not in o.parts:
        return binary(np.multiply)(o)
    kind = o.parts[-1]
    d, type_ = o.target(o[0], _wide(kind)), TYPES[_wide(kind)]
    a, b = o.source(o[1], kind), o.source(o[2], kind)
    return assign(d, lambda: np.multiply(a, b, dtype=type_))


def mad(o: Operands) -> Operation:
    kind, form = o.parts[-1], o.parts[1]
    if form not in ("lo", "wide"):
        raise o.unknown()
    to = _wide(kind) if form == "wide" else kind
    d, type_ = o.target(o[0], to), TYPES[to]
    a, b, c = o.source(o[1], kind), o.source(o[2], kind), o.source(o[3], to)
    return assign(d, lambda: np.multiply(a, b, dtype=type_) + c)


def fma(o: Operands) -> Operation:
    """In float32 the product is exact, in 64 bits; the sum is rounded twice, which differs in the
    last bit once in some 2^29 cases."""
    kind = o.parts[-1]
    if kind not in _FLOATS or set(o.parts) - {"fma", "rn", "ftz", kind}:
        raise o.unknown()
    d = o.target(o[0], kind)
    a, b, c = (o.source(o[n], kind) for n in (1, 2, 3))
    if kind == "f64":
        shape = np.zeros(o.m.threads)

        def exact() -> np.ndarray:
            rows = (np.asarray(x + shape).tolist() for x in (a, b, c))
            return np.array([_fma64(*x) for x in zip(*rows, strict=True)])

        return assign(d, exact)
    if "ftz" not in o.parts:
        return assign(d, lambda: np.multiply(a, b, dtype=np.float64) + c)
    return assign(
        d,
        lambda: flush(
            (np.multiply(flush(a), flush(b), dtype=np.float64) + flush(c)).astype(np.float32)
        ),
    )


def divide(o: Operands) -> Operation:
    """``div`` of floats and integers, ``rem``."""
    parts, kind = o.parts, o.parts[-1]
    if kind in _FLOATS:
        return binary(np.divide)(o)
    if kind != "s32":
        raise o.unknown()
    d, a, b = o.target(o[0], kind), o.source(o[1], kind), o.source(o[2], kind)

    def run(mask: Mask) -> None:
        divisor = np.broadcast_to(b, d.shape).astype(np.int64)
        if ((divisor == 0) & mask).any():
            o.m.findings.add("division by 0", o.i, "")
        divisor = np.where(divisor == 0, 1, divisor)
        quotient = np.trunc(a / divisor).astype(np.int64)  # exact: 32 bits in 53
        result = a - quotient * divisor if parts[0] == "rem" else quotient
        np.copyto(d, result, where=mask, casting="unsafe")

    return run


def packed(o: Operands) -> Operation:
    """Several numbers in each register: ``f32x2``, ``f16x2``."""
    kind, name = o.parts[-1], o.parts[0]
    if (
        kind not in _PACKED_TYPES
        or set(o.parts) - {name, "rn", "ftz", kind}
        or (name != "fma" and name not in _PACKED)
    ):
        raise o.unknown()
    type_, count = _PACKED_TYPES[kind]
    flushed = flush if "ftz" in o.parts and kind == "f32x2" else lambda x: x
    d = o.m.registers.row(o[0]).view(type_)
    words = [o.source(x, f"b{8 * count * d.itemsize}") for x in o.i.operands[1:]]
    rows = [x if isinstance(x, np.ndarray) else np.full(o.m.threads, x) for x in words]
    sources = [x.view(type_) for x in rows]

    def compute() -> Any:
        values = [flushed(x) for x in sources]
        if name == "fma":
            a, b, c = values
            return flushed((np.multiply(a, b, dtype=np.float64) + c).astype(type_))
        return flushed(_PACKED[name](*values))

    def run(mask: Mask) -> None:
        np.copyto(d, compute(), where=True if mask is True else np.repeat(mask, count))

    return run


def unary(function: np.ufunc) -> Callable[[Operands], Operation]:
    """``neg``, ``abs``."""

    def make(o: Operands) -> Operation:
        kind = o.parts[-1]
        d, a = o.target(o[0], kind), o.source(o[1], kind)
        if "ftz" in o.parts:
            return assign(d, lambda: flush(function(flush(a))))
        return ufunc(function, d, a)

    return make


def ex2(o: Operands) -> Operation:
    if o.i.op not in ("ex2.approx.ftz.f32", "ex2.approx.f32"):
        raise o.unknown()
    d, a = o.target(o[0], "f32"), o.source(o[1], "f32")
    return assign(d, lambda: flush(np.exp2(flush(a))))


def rsqrt(o: Operands) -> Operation:
    if o.i.op != "rsqrt.approx.ftz.f32":
        raise o.unknown()
    d, a = o.target(o[0], "f32"), o.source(o[1], "f32")
    return assign(d, lambda: flush(1 / np.sqrt(flush(a))))


def minmax(o: Operands) -> Operation:
    """``min``, ``max`` of two or three; of numbers and none the number, unless ``NaN`` is said."""
    name, kind = o.parts[0], o.parts[-1]
    if set(o.parts) - {name, kind, "ftz"} - ({"NaN"} if kind in _FLOATS else set()):
        raise o.unknown()
    sources = [o.source(x, kind) for x in o.i.operands[1:]]
    d, ordered = o.target(o[0], kind), kind in _FLOATS and "NaN" not in o.parts
    smaller, larger = (np.fmin, np.fmax) if ordered else (np.minimum, np.maximum)
    function = smaller if name == "min" else larger
    if len(sources) == 3:
        a, b, c = sources
        return assign(d, lambda: function(function(a, b), c))
    return ufunc(function, d, *sources)
