"""Conversions: ``cvt``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..numbers import from_bfloat16, from_e4m3, to_bfloat16, to_e4m3, to_float16
from .operands import TYPES, Operands, Operation, assign, flush

#: Those of one number of another: name -> what it does with a row.
_PLAIN = ("cvt.f64.f32", "cvt.rn.f32.s32", "cvt.rn.f64.s32", "cvt.rn.f64.s64")


def cvt(o: Operands) -> Operation:
    if len(o.i.operands) == 3:
        return _pack(o)
    op, parts = o.i.op, o.parts
    to, of = parts[-2:]
    if op == "cvt.f32.bf16":
        a = o.source(o[1], "b16")
        return assign(o.target(o[0], "f32"), lambda: from_bfloat16(np.ascontiguousarray(a)))
    if op == "cvt.f32.f16":
        d, half = o.target(o[0], "f32"), o.source(o[1], "f16")
        return assign(d, lambda: half.astype(np.float32))
    if op in ("cvt.rn.f16.f32", "cvt.rn.bf16.f32"):
        narrow = to_float16 if to == "f16" else to_bfloat16
        d, wide = o.target(o[0], "b16"), o.source(o[1], "f32")
        return assign(d, lambda: narrow(wide))
    if op == "cvt.rn.f16x2.e4m3x2":
        d, pair = o.target(o[0], "b32"), o.source(o[1], "b16")
        return assign(d, lambda: _halves(from_e4m3(np.ascontiguousarray(pair).view(np.uint8))))
    if op in ("cvt.rmi.ftz.f32.f32", "cvt.rni.ftz.f32.f32"):
        return _whole(o)
    if parts[1] == "rzi" and of == "f32" and to in ("s16", "s32") and len(parts) == 4:
        return _truncate(o, to)
    if op in ("cvt.rn.f16.s32", "cvt.rn.bf16.s32"):
        narrow = to_float16 if to == "f16" else to_bfloat16
        d, whole = o.target(o[0], "b16"), o.source(o[1], "s32")
        return assign(d, lambda: narrow(whole.astype(np.float32)))  # exact up to 2^24
    if op in _PLAIN:
        d, a = o.target(o[0], to), o.source(o[1], of)
        return assign(d, lambda: a)
    if len(parts) == 3 and to[0] in "us" and of[0] in "us":
        row = o.m.registers.row(o[0])
        d = row.view(f"{'i' if to[0] == 's' else 'u'}{row.itemsize}")
        a, type_ = o.source(o[1], of), TYPES[to]
        return assign(d, lambda: a.astype(type_))
    raise o.unknown()


def _pack(o: Operands) -> Operation:
    """Two float32 into one register, the first into its upper half."""
    packers: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
        "cvt.rn.bf16x2.f32": (to_bfloat16, "b32"),
        "cvt.rn.f16x2.f32": (to_float16, "b32"),
        "cvt.rn.satfinite.e4m3x2.f32": (to_e4m3, "b16"),
    }
    if o.i.op not in packers:
        raise o.unknown()
    narrow, kind = packers[o.i.op]
    d, full = o.target(o[0], kind), np.zeros(o.m.threads, np.float32)
    a, b, half = o.source(o[1], "f32"), o.source(o[2], "f32"), np.uint32(4 * d.itemsize)

    def pack() -> Any:
        high, low = (narrow(x if isinstance(x, np.ndarray) else full + x) for x in (a, b))
        return high.astype(np.uint32) << half | low.astype(np.uint32)

    return assign(d, pack)


def _halves(pairs: np.ndarray) -> np.ndarray:
    """float32 ``[2 N]`` -> two fp16 in each of ``[N]``."""
    return pairs.astype(np.float16).view(np.uint32)


def _whole(o: Operands) -> Operation:
    function = np.floor if o.parts[1] == "rmi" else np.rint
    d, a = o.target(o[0], "f32"), o.source(o[1], "f32")
    return assign(d, lambda: function(flush(a)))


def _truncate(o: Operands, to: str) -> Operation:
    d, a, limits = o.target(o[0], to), o.source(o[1], "f32"), np.iinfo(TYPES[to])

    def truncate() -> np.ndarray:
        whole = np.trunc(np.nan_to_num(a.astype(np.float64), nan=0.0))
        return np.clip(whole, limits.min, limits.max).astype(np.int64)

    return assign(d, truncate)
