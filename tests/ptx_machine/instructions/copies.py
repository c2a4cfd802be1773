"""Asynchronous copies from global to shared memory: ``cp.async`` (sm_80 and newer)."""

from __future__ import annotations

import numpy as np

from ..state import Copy, State
from .operands import Mask, Operands, Operation


def cp(o: Operands) -> Operation:
    """Data arrive when they are waited for: till then nobody may look, or write there."""
    op = o.i.op
    if op == "cp.async.commit_group":
        return _commit(o)
    if op in ("cp.async.wait_group", "cp.async.wait_all"):
        return _wait(o, int(o[0]) if op.endswith("group") else 0)
    if op not in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        raise o.unknown()
    size = int(o[2], 0)
    if size not in (4, 8, 16) or (".cg." in op and size != 16):
        raise o.unknown()
    i, m = o.i, o.m
    target, source = o.addresses(o[0], "u32"), o.addresses(o[1], "u64")
    wanted = o.source(o[3], "u32") if len(o.i.operands) > 3 else np.uint32(size)
    unit = min(size, 8)

    def copy(mask: Mask) -> None:
        select = np.arange(m.threads) if mask is True else np.flatnonzero(mask)
        offsets, good = m.shared.place(i, target()[select], size, m.tid[select])
        select, offsets = select[good], offsets[good]
        if not len(select):
            return
        threads = m.tid[select]
        length = np.broadcast_to(wanted, (m.threads,))[select]
        full = length == size
        if not (full | (length == 0)).all():
            raise o.unknown("part of a copy")
        data = np.zeros((len(select), size), np.uint8)  # what isn't copied is 0
        if full.any():
            values = m.memory.load(i, source()[select][full], unit, size // unit, threads[full])
            data[full] = np.ascontiguousarray(values.T).view(np.uint8).reshape(-1, size)
        m.shared.check_write(i, offsets, size, threads)
        m.shared.fly(offsets, size, True)
        m.open_copies.append(Copy(threads, offsets, data, i))

    return copy


def _commit(o: Operands) -> Operation:
    def commit(mask: Mask) -> None:
        if mask is not True:
            raise o.unknown("not by all threads together")
        o.m.copies.append(o.m.open_copies)
        o.m.open_copies = []

    return commit


def _wait(o: Operands, keep: int) -> Operation:
    m = o.m

    def wait(mask: Mask) -> None:
        if mask is not True:
            raise o.unknown("not by all threads together")
        done = m.copies[: len(m.copies) - keep] if keep < len(m.copies) else []
        m.copies = m.copies[len(done) :]
        for copy in (copy for group in done for copy in group):
            _arrive(m, copy)

    return wait


def _arrive(m: State, copy: Copy) -> None:
    size = copy.data.shape[1]
    m.shared.fly(copy.offsets, size, False)
    single = copy.offsets[:, None] + np.arange(size)
    m.shared.bytes[single] = copy.data
    if (m.shared.bytes[single] != copy.data).any():
        m.findings.add("race: threads copy different values", copy.instruction, "at once")
    unit = min(size, 8)
    places, threads = copy.offsets // unit, copy.threads
    if size == 16:
        places, threads = np.concatenate((places, places + 1)), np.concatenate((threads, threads))
    m.shared.mark_written(places, threads, unit)
