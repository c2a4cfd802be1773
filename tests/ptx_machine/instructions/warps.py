"""What the 32 threads of a warp do together: ``shfl``, ``redux``, ``ldmatrix``, ``stmatrix``."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .memory import REDUCTIONS, read_shared, write_shared
from .operands import Mask, Operands, Operation


def whole_warps(o: Operands, mask: Mask) -> None:
    """Note a warp of which some threads take part only."""
    if mask is not True:
        each = mask.reshape(-1, 32)
        if (each.any(1) != each.all(1)).any():
            o.m.findings.add("warp instruction without all of its threads", o.i, "")


def _everyone(o: Operands, operand: str) -> Callable[[Mask], None]:
    """``operand``: the threads that the instruction says take part."""
    members = o.source(operand, "b32")

    def check(mask: Mask) -> None:
        if (np.asarray(members) != np.uint32(0xFFFFFFFF)).any():
            o.m.findings.add("warp instruction for some threads only", o.i, str(members))
        whole_warps(o, mask)

    return check


def shfl(o: Operands) -> Operation:
    """A register of another thread of the warp."""
    form = o.parts[2]
    if o.parts[-1] != "b32" or "|" in o[0] or o.m.threads % 32:
        raise o.unknown()
    d, a = o.target(o[0], "b32"), o.source(o[1], "b32")
    distance, clamp, check = o.source(o[2], "u32"), int(o[3], 0), _everyone(o, o[4])
    lanes, warps = np.arange(32), np.arange(o.m.threads) & ~31
    if isinstance(distance, np.ndarray):
        if (form, clamp) != ("idx", 31):
            raise o.unknown()
        return _checked(check, d, lambda: a[warps + (distance & 31)])
    distance = int(distance)
    if (form, clamp) == ("bfly", 31):
        of = lanes ^ distance
    elif (form, clamp) == ("idx", 31):
        of = np.full(32, distance & 31)
    elif (form, clamp) == ("up", 0):
        of = np.where(lanes >= distance, lanes - distance, lanes)
    else:
        raise o.unknown()
    places = warps + np.tile(of, o.m.threads // 32)
    return _checked(check, d, lambda: a[places])


def redux(o: Operands) -> Operation:
    """A sum or an extreme over the warp."""
    if o.parts[-1] != "s32" or o.parts[2] not in REDUCTIONS or o.m.threads % 32:
        raise o.unknown()
    d, a, function = o.target(o[0], "s32"), o.source(o[1], "s32"), REDUCTIONS[o.parts[2]]

    def reduced() -> np.ndarray:
        return np.repeat(function.reduce(a.reshape(-1, 32), axis=1, dtype=np.int32), 32)

    return _checked(_everyone(o, o[2]), d, reduced)


def _checked(
    check: Callable[[Mask], None], d: np.ndarray, compute: Callable[[], np.ndarray]
) -> Operation:
    def run(mask: Mask) -> None:
        check(mask)
        np.copyto(d, compute(), where=mask)

    return run


def ldmatrix(o: Operands) -> Operation:
    """Matrices of 8 x 8 16-bit numbers: lanes 8 n .. 8 n + 7 have the addresses of the rows of
    matrix n, and every thread gets two neighbours of a row (of a column: ``trans``)."""
    match = re.fullmatch(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", o.i.op)
    if match is None:
        raise o.unknown()
    count, m = int(match[1]), o.m
    targets = [o.target(x, "b32") for x in o[0]]
    where = o.addresses(o[1], "u32")
    giving = np.tile(np.arange(32) < 8 * count, m.threads // 32)

    def run(mask: Mask) -> None:
        whole_warps(o, mask)
        select = giving & mask
        rows = np.ones((4, m.threads), np.uint32)
        rows[:, select] = read_shared(o, where()[select], 4, 4, m.tid[select])
        # [warp, matrix, row, column]
        matrices = np.ascontiguousarray(rows.T).view(np.uint16).reshape(-1, 4, 8, 8)[:, :count]
        if match[2]:
            matrices = matrices.swapaxes(2, 3)
        values = np.ascontiguousarray(matrices.swapaxes(0, 1)).view(np.uint32).reshape(count, -1)
        for target, value in zip(targets, values, strict=True):
            np.copyto(target, value, where=mask)

    return run


def stmatrix(o: Operands) -> Operation:
    """The other way round."""
    match = re.fullmatch(r"stmatrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16", o.i.op)
    if match is None:
        raise o.unknown()
    count, warps = int(match[1]), o.m.threads // 32
    sources = [o.source(x, "b32") for x in o[1]]
    where = o.addresses(o[0], "u32")

    def run(mask: Mask) -> None:
        if mask is not True:
            raise o.unknown("not by all threads together")
        addresses = where().reshape(warps, 32)[:, : 8 * count].ravel()
        threads = o.m.tid.reshape(warps, 32)[:, : 8 * count].ravel()
        words = np.stack(sources).reshape(count, warps, 8, 4)  # [matrix, warp, row, pair]
        raw = np.ascontiguousarray(words.transpose(1, 0, 2, 3)).reshape(-1, 4).view(np.uint8)
        write_shared(o, addresses, raw, threads)

    return run
