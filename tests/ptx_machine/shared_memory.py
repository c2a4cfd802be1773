"""The shared memory of one block, and what was done to each of its bytes since the last barrier."""

from __future__ import annotations

import numpy as np

from .findings import Findings
from .ptx import Instruction
from .words import ONES, POISON, SHIFT, WORDS

_ATOMIC = 0xFE  # in place of a warp: written by an atomic


class Shared:
    """The shared memory of one block, with what was done to each byte since the last barrier."""

    def __init__(self, size: int, base: int, findings: Findings) -> None:
        self.size, self.base, self.findings = size, base, findings
        self.bytes = _padded(size)
        self.written = _padded(size)  # ever
        self.flying = _padded(size)  # an asynchronous copy to it hasn't been waited for
        self.writer = _padded(size)  # warp + 1 since the last barrier
        self.lane = _padded(size)  # lane + 1 of it
        self.readers = _padded(size)  # one bit for each warp since the last barrier
        self.unfenced = _padded(size)  # written since the last fence of the asynchronous proxy
        self.pinned: list[tuple[np.ndarray, int]] = []  # read by a wgmma that isn't waited for
        self.views = {n: self.bytes.view(t) for n, t in WORDS.items()}
        self._shadows = {
            name: {n: getattr(self, name).view(t) for n, t in WORDS.items()}
            for name in ("written", "flying", "writer", "lane", "readers", "unfenced")
        }

    def clear(self) -> None:
        self.bytes[:] = np.resize(POISON, len(self.bytes))
        for name in ("written", "flying", "writer", "lane", "readers", "unfenced"):
            getattr(self, name).fill(0)
        self.pinned = []

    def barrier(self) -> None:
        for shadow in (self.writer, self.lane, self.readers):
            shadow.fill(0)
        for places, warps in self.pinned:
            self.readers[places] |= np.uint8(warps)

    def read_by_matrix_unit(
        self, i: Instruction, offsets: np.ndarray, first_warp: int
    ) -> np.ndarray:
        """16 bytes at each of ``offsets [..., N]``, for the four warps from ``first_warp`` on."""
        flat = np.unique(offsets)
        places = (flat[:, None] + np.arange(16)).ravel()
        if places.max() >= self.size or flat.min() < 0:
            self.findings.add("shared out of bounds", i, f"offsets {flat.min()} .. {places.max()}")
            return np.zeros((*offsets.shape, 16), np.uint8)
        self.check_read(i, flat, 16, np.full(len(flat), 32 * first_warp))
        if self.unfenced[places].any():
            self.findings.add("written since the last fence.proxy.async", i, f"offset {flat[0]}")
        warps = 15 << first_warp
        self.readers[places] |= np.uint8(warps)
        self.pinned.append((places, warps))
        return self.bytes[offsets[..., None] + np.arange(16)]

    def place(
        self, i: Instruction, addresses: np.ndarray, size: int, threads: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Offsets of accesses that are all right, and which of them are."""
        offsets = addresses - np.uint32(self.base)
        good = offsets <= np.uint32(self.size - size)
        if not good.all():
            t = np.flatnonzero(~good)[0]
            self.findings.add(
                "shared out of bounds",
                i,
                f"thread {threads[t]}: {size} bytes at offset {int(offsets[t].view(np.int32))} of "
                f"{self.size}; {np.count_nonzero(~good)} threads",
            )
        if size > 1:
            even = (offsets & np.uint32(size - 1)) == 0
            if not even.all():
                t = np.flatnonzero(~even)[0]
                self.findings.add(
                    "shared misaligned", i, f"thread {threads[t]}: {size} bytes at {offsets[t]}"
                )
                good &= even
        return offsets.astype(np.int64), good

    def check_read(
        self, i: Instruction, offsets: np.ndarray, size: int, threads: np.ndarray
    ) -> None:
        """``offsets [N]`` of accesses of ``size`` bytes by ``threads [N]``."""
        unit = min(size, 8)
        places = offsets >> SHIFT[unit]
        if size == 16:
            places = np.concatenate((places, places + 1))
            threads = np.concatenate((threads, threads))
        shadow = self._shadows
        written = shadow["written"][unit].take(places)
        if not (written == ONES[unit]).all():
            t = np.flatnonzero(written != ONES[unit])
            self.findings.add(
                "shared read before written",
                i,
                f"thread {threads[t[0]]} offset {places[t[0]] * unit}; {len(t)} accesses",
            )
        flying = shadow["flying"][unit].take(places)
        if flying.any():
            t = np.flatnonzero(flying)
            self.findings.add(
                "asynchronous copy read before wait",
                i,
                f"thread {threads[t[0]]} offset {places[t[0]] * unit}; {len(t)} accesses",
            )
        writer = shadow["writer"][unit].take(places)
        if writer.any():
            self._check_writer(i, "read after write", places, unit, threads)
        warps = (threads >> 5).astype(WORDS[unit])
        bits = (WORDS[unit](1) << warps) * ONES[unit]
        np.bitwise_or.at(shadow["readers"][unit], places, bits)

    def _check_writer(
        self, i: Instruction, kind: str, places: np.ndarray, unit: int, threads: np.ndarray
    ) -> None:
        """Whether another thread has written there since the last barrier; byte by byte."""
        single = (places[:, None] * unit + np.arange(unit)).ravel()
        who = np.repeat(threads, unit)
        writer, lane = self.writer[single], self.lane[single]
        warp = (who >> 5) + 1
        other = (writer != 0) & (writer != warp)
        if other.any():
            t = np.flatnonzero(other)[0]
            by = "an atomic" if writer[t] == _ATOMIC else f"warp {writer[t] - 1} lane {lane[t] - 1}"
            self.findings.add(
                f"race: {kind}",
                i,
                f"thread {who[t]} (warp {who[t] >> 5}) offset {single[t]}, written by {by} since "
                f"the last barrier; {np.count_nonzero(other)} bytes",
            )
        inside = (writer == warp) & (lane != (who & 31) + 1)
        if inside.any():
            t = np.flatnonzero(inside)[0]
            self.findings.add(
                f"race inside a warp: {kind}",
                i,
                f"thread {who[t]} offset {single[t]}, written by lane {lane[t] - 1} of its warp "
                f"since the last barrier; {np.count_nonzero(inside)} bytes",
            )

    def check_write(
        self, i: Instruction, offsets: np.ndarray, size: int, threads: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """The same for a write. Returns what :meth:`mark_written` wants."""
        unit = min(size, 8)
        places = offsets >> SHIFT[unit]
        if size == 16:
            places = np.concatenate((places, places + 1))
            threads = np.concatenate((threads, threads))
        shadow = self._shadows
        if shadow["flying"][unit].take(places).any():
            self.findings.add("write into an asynchronous copy", i, f"offset {places[0] * unit}")
        if shadow["writer"][unit].take(places).any():
            self._check_writer(i, "write after write", places, unit, threads)
        readers = shadow["readers"][unit].take(places)
        if readers.any():
            warps = (threads >> 5).astype(WORDS[unit])
            bits = (WORDS[unit](1) << warps) * ONES[unit]
            other = readers & ~bits
            if other.any():
                t = np.flatnonzero(other)[0]
                self.findings.add(
                    "race: write after read",
                    i,
                    f"thread {threads[t]} (warp {threads[t] >> 5}) offset {places[t] * unit}, read "
                    f"by warps {int(other[t]) & 0xFF:b} (bits) since the last barrier",
                )
        return places, threads, unit

    def mark_written(self, places: np.ndarray, threads: np.ndarray, unit: int) -> None:
        """Several threads may write the same value at once: one of them counts as the writer."""
        shadow, kind, ones = self._shadows, WORDS[unit], ONES[unit]
        shadow["written"][unit][places] = ones
        shadow["unfenced"][unit][places] = ones
        writers = ((threads >> 5).astype(kind) + kind(1)) * ones
        shadow["writer"][unit][places] = writers
        shadow["lane"][unit][places] = ((threads & 31).astype(kind) + kind(1)) * ones

    def mark_atomic(self, i: Instruction, offsets: np.ndarray, threads: np.ndarray) -> None:
        """4 bytes each."""
        writer = self.writer[offsets]
        warp = (threads >> 5) + 1
        if ((writer != 0) & (writer != _ATOMIC) & (writer != warp)).any():
            self.findings.add("race: atomic after write", i, "since the last barrier")
        bytes_ = (offsets[:, None] + np.arange(4)).ravel()
        if not self.written[bytes_].all():
            self.findings.add("shared read before written", i, f"offset {offsets[0]}")
        self.writer[bytes_] = _ATOMIC

    def fly(self, offsets: np.ndarray, size: int, flag: bool) -> None:
        places = (offsets[:, None] + np.arange(size)).ravel()
        self.flying[places] = flag
        if flag:
            self.bytes[places] = 0xFF
            self.written[places] = 1


def _padded(size: int) -> np.ndarray:
    return np.zeros(-(-size // 16) * 16, np.uint8)
