"""Products of small matrices by a warp: ``mma.sync`` (sm_80 and newer; FP8 on sm_89 and sm_120)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..numbers import from_bfloat16, from_e4m3
from .operands import Mask, Operands, Operation
from .warps import whole_warps


class Format(NamedTuple):
    """Numbers as a matrix unit takes them: ``each`` of them in a register, ``read`` as float32."""

    each: int
    read: Callable[[np.ndarray], np.ndarray]


FORMATS = {
    "bf16": Format(2, from_bfloat16),
    "f16": Format(2, lambda x: x.view(np.float16).astype(np.float32)),
    "s8": Format(4, lambda x: x.view(np.int8).astype(np.float32)),
    "e4m3": Format(4, from_e4m3),
}
#: What follows ``mma.sync.aligned.`` -> kind of the inputs and of the sums. Those of sm_89's FP8
#: have fewer bits than a float32 on a card; here they have all.
_KNOWN = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": ("bf16", "f32"),
    "m16n8k16.row.col.f32.f16.f16.f32": ("f16", "f32"),
    "m16n8k16.row.col.f16.f16.f16.f16": ("f16", "f16"),
    "m16n8k32.row.col.satfinite.s32.s8.s8.s32": ("s8", "s32"),
    "m16n8k32.row.col.f32.e4m3.e4m3.f32": ("e4m3", "f32"),
    "m16n8k32.row.col.f16.e4m3.e4m3.f16": ("e4m3", "f16"),
}


def mma(o: Operands) -> Operation:
    """``d = a b + c``: a 16 rows, b 8 columns."""
    name = o.i.op.removeprefix("mma.sync.aligned.").replace("kind::f8f6f4.", "")
    if name not in _KNOWN:
        raise o.unknown()
    kind, sums = _KNOWN[name]
    each, read = FORMATS[kind]
    warps, threads = o.m.threads // 32, o.m.threads
    a, b = ([o.source(x, "b32") for x in o[n]] for n in (1, 2))
    whole = "b32" if sums == "f16" else sums
    d, c = [o.target(x, whole) for x in o[0]], [o.source(x, whole) for x in o[3]]

    def run(mask: Mask) -> None:
        whole_warps(o, mask)
        # Registers [column half, row half], threads (group, place), neighbours in a row.
        left = read(np.stack(a)).reshape(2, 2, warps, 8, 4, each)
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 8 * each)
        right = read(np.stack(b)).reshape(2, warps, 8, 4, each)
        right = right.transpose(1, 0, 3, 4, 2).reshape(warps, 8 * each, 8)
        product = left @ right  # 8-bit sums stay below 2^24
        # [row half, neighbour] of (warp, row half, group, place, neighbour)
        product = product.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(2, 2, -1)
        if sums == "f16":
            for n, row in enumerate(d):
                before = np.broadcast_to(c[n], (threads,)).copy().view(np.float16).reshape(-1, 2)
                after = (product[n].T + before.astype(np.float32)).astype(np.float16)
                np.copyto(row, after.view(np.uint32).ravel(), where=mask)
            return
        for n, part in enumerate(product.reshape(4, -1)):
            if sums == "s32":
                total = np.broadcast_to(c[n], (threads,)).astype(np.int64) + part.astype(np.int64)
                value = np.clip(total, -(2**31), 2**31 - 1)
            else:
                value = part + c[n]
            np.copyto(d[n], value, where=mask, casting="unsafe")

    return run
