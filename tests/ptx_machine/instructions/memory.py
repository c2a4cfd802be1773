"""Loads, stores and atomic additions; every access is checked by the memory that it goes to."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..state import State
from ..words import poison
from .operands import Mask, Operands, Operation

REDUCTIONS: dict[str, Any] = {"add": np.add, "min": np.minimum, "max": np.maximum}


def ld(o: Operands) -> Operation:
    space, (unit, count) = _space(o), _shape(o)
    names = o[0] if isinstance(o[0], list) else [o[0]]
    rows = [o.m.registers.row(x) for x in names]
    if len(names) != count or any(row.itemsize < unit for row in rows):
        raise o.unknown()
    signed = o.parts[-1][0] == "s"
    if signed:
        rows = [row.view(f"i{row.itemsize}") for row in rows]
    type_ = np.dtype(f"{'i' if signed else 'u'}{unit}")
    if space == "param":
        return _parameter(o, rows[0], type_)
    where = o.addresses(o[1], "u64" if space == "global" else "u32")
    i, m = o.i, o.m

    def load(mask: Mask) -> None:
        addresses, threads = some(where(), mask), some(m.tid, mask)
        if space == "global":
            values = m.memory.load(i, addresses, unit, count, threads)
        else:
            values = read_shared(o, addresses, unit, count, threads)
        for row, value in zip(rows, values.view(type_), strict=True):
            row[... if mask is True else mask] = value

    return load


def _parameter(o: Operands, row: np.ndarray, type_: np.dtype) -> Operation:
    name, offset = o[1]

    def parameter(mask: Mask) -> None:
        raw = o.m.parameters[name]
        if offset + type_.itemsize > len(raw):
            o.m.findings.add("parameter read beyond its size", o.i, name)
            return
        value = np.frombuffer(raw, type_, 1, offset)[0]
        np.copyto(row, value.astype(row.dtype), where=mask)

    return parameter


def st(o: Operands) -> Operation:
    space, (unit, count) = _space(o), _shape(o)
    names = o[1] if isinstance(o[1], list) else [o[1]]
    if len(names) != count or space == "param":
        raise o.unknown()
    sources = [o.source(x, f"b{8 * unit}") for x in names]
    where = o.addresses(o[0], "u64" if space == "global" else "u32")
    i, m = o.i, o.m

    def store(mask: Mask) -> None:
        values = np.empty((count, m.threads), f"u{unit}")
        for n, source in enumerate(sources):
            values[n] = source
        values = values if mask is True else values[:, mask]
        addresses, threads = some(where(), mask), some(m.tid, mask)
        if space == "global":
            m.memory.store(i, addresses, values, threads)
        else:
            raw = np.ascontiguousarray(values.T).view(np.uint8).reshape(-1, unit * count)
            write_shared(o, addresses, raw, threads)

    return store


def some(rows: np.ndarray, mask: Mask) -> np.ndarray:
    """Of the threads that take part."""
    return rows if mask is True else rows[mask]


def read_shared(
    o: Operands, addresses: np.ndarray, unit: int, count: int, threads: np.ndarray
) -> np.ndarray:
    """``[count, N]`` words of ``unit`` bytes; poison where an access isn't allowed."""
    i, shared = o.i, o.m.shared
    offsets, good = shared.place(i, addresses, unit * count, threads)
    view = shared.views[unit]
    if good.all():
        shared.check_read(i, offsets, unit * count, threads)
        places = offsets // unit
        return np.stack([view.take(places + n) for n in range(count)])
    out = np.full((count, len(addresses)), poison(unit))
    if good.any():
        shared.check_read(i, offsets[good], unit * count, threads[good])
        for n in range(count):
            out[n, good] = view[offsets[good] // unit + n]
    return out


def write_shared(o: Operands, addresses: np.ndarray, raw: np.ndarray, threads: np.ndarray) -> None:
    """``raw [N, size]`` bytes, where an access is allowed."""
    i, shared, size = o.i, o.m.shared, raw.shape[1]
    offsets, good = shared.place(i, addresses, size, threads)
    if not good.all():
        offsets, threads, raw = offsets[good], threads[good], raw[good]
        if not len(offsets):
            return
    note = shared.check_write(i, offsets, size, threads)
    unit = min(size, 8)
    words = np.ascontiguousarray(raw).view(f"u{unit}")  # [N, words]
    view, places = shared.views[unit], offsets // unit
    for n in range(size // unit):
        view[places + n] = words[:, n]
    for n in range(size // unit):
        if (view.take(places + n) != words[:, n]).any():
            o.m.findings.add("race: threads write different values", i, "in one instruction")
    shared.mark_written(*note)


def atom(o: Operands) -> Operation:
    """Additions to shared memory, one thread after another."""
    if o.i.op != "atom.relaxed.sys.shared.add.u32":
        raise o.unknown()
    i, m = o.i, o.m
    d, b = o.target(o[0], "u32"), o.source(o[2], "u32")
    where = o.addresses(o[1], "u32")

    def run(mask: Mask) -> None:
        select = _numbers(m, mask)
        offsets, good = m.shared.place(i, where()[select], 4, m.tid[select])
        select, offsets = select[good], offsets[good]
        if not len(select):
            return
        m.shared.mark_atomic(i, offsets, m.tid[select])
        view, values = m.shared.views[4], np.broadcast_to(b, (m.threads,))
        for t, place in zip(select, offsets // 4, strict=True):
            d[t] = view[place]
            view[place] += values[t]

    return run


def red(o: Operands) -> Operation:
    """Sums and extremes in global memory."""
    match = re.fullmatch(r"red\.global\.gpu\.relaxed\.(add|min|max)\.([us](?:32|64))", o.i.op)
    if match is None:
        raise o.unknown()
    m, function = o.m, REDUCTIONS[match[1]]
    where, b = o.addresses(o[0], "u64"), o.source(o[1], match[2])

    def run(mask: Mask) -> None:
        values = some(np.broadcast_to(b, (m.threads,)), mask)
        m.memory.update(o.i, function, some(where(), mask), values, some(m.tid, mask))

    return run


def _numbers(m: State, mask: Mask) -> np.ndarray:
    """Of the threads that take part."""
    return np.arange(m.threads) if mask is True else np.flatnonzero(mask)


def _shape(o: Operands) -> tuple[int, int]:
    """Bytes of a unit, and how many."""
    count = next((int(p[1:]) for p in o.parts if re.fullmatch(r"v\d", p)), 1)
    return int(o.parts[-1][1:]) // 8, count


def _space(o: Operands) -> str:
    parts = o.parts
    space = parts[1].split("::")[0]
    allowed: set[Any] = {"ld", "st", parts[1], parts[-1], "v2", "v4"}
    if space not in ("global", "shared", "param") or set(parts) - allowed:
        raise o.unknown()
    return space
