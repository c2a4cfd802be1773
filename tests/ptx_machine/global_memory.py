"""Global memory: one region for each tensor, with the blocks that have written to it."""

from __future__ import annotations

import mmap

import numpy as np

from .findings import Findings
from .ptx import Instruction
from .words import ADDRESS, POISON32, POISON64, SHIFT, TAG_SHIFT, WORDS, poison


class Region:
    """Memory that one parameter points at."""

    def __init__(
        self,
        name: str,
        start: int,
        memory: np.ndarray,
        allowed: np.ndarray | None,
        writable: bool,
    ) -> None:
        """``memory``: bytes from ``start`` rounded down to 16; ``allowed``: 1 for each of them that
        belongs to the tensor, or None if all do."""
        self.name, self.start, self.writable = name, start, writable
        self.memory, self.allowed = memory, allowed
        self.aligned = start & ~15
        whole = len(memory) // 8 * 8
        self.views = {n: memory[:whole].view(t) for n, t in WORDS.items()}
        self.length = len(memory) - (start - self.aligned)
        self.shadow: np.ndarray | None = None  # block % 254 + 1 that has written

    def shadow_of(self) -> np.ndarray:
        if self.shadow is None:
            self.shadow = lazy_zeros(len(self.memory))
        return self.shadow


def lazy_zeros(size: int) -> np.ndarray:
    """Memory that takes room only where it is touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, max(size, 16), flags=flags), np.uint8)[:size]


class Global:
    """Global memory: regions by the tag of an address."""

    def __init__(self, regions: dict[int, Region], findings: Findings) -> None:
        self.regions, self.findings = regions, findings
        self.marker = 1  # of the block that runs

    def _groups(
        self, i: Instruction, addresses: np.ndarray, size: int, threads: np.ndarray, write: bool
    ) -> list[tuple[Region, np.ndarray, np.ndarray]]:
        """(region, offsets into its memory, which accesses) of those that are all right."""
        tags = addresses >> TAG_SHIFT
        result = []
        kinds = [tags[0]] if (tags == tags[0]).all() else np.unique(tags)
        for tag in kinds:
            which = np.arange(len(addresses)) if len(kinds) == 1 else np.flatnonzero(tags == tag)
            region = self.regions.get(int(tag))
            real = addresses[which] & ADDRESS
            if region is None:
                t = which[0]
                self.findings.add(
                    "global address of no tensor", i, f"thread {threads[t]}: {int(real[0]):#x}"
                )
                continue
            offsets = real.astype(np.int64) - region.aligned
            first = region.start - region.aligned
            good = (offsets >= first) & (offsets + size <= first + region.length)
            if not good.all():
                t = np.flatnonzero(~good)[0]
                self.findings.add(
                    "global out of bounds",
                    i,
                    f"thread {threads[which[t]]}: {size} bytes at {region.name} + "
                    f"{offsets[t] - first} of {region.length}; {np.count_nonzero(~good)} threads",
                )
            if size > 1 and (offsets & (size - 1)).any():
                t = np.flatnonzero(offsets & (size - 1))[0]
                self.findings.add(
                    "global misaligned",
                    i,
                    f"thread {threads[which[t]]}: {size} bytes at {region.name} + "
                    f"{offsets[t] - first}, address {int(real[t]):#x}",
                )
            if region.allowed is not None:
                inside = offsets[good][:, None] + np.arange(size)
                holes = ~region.allowed[inside].all(1)
                if holes.any():
                    t = np.flatnonzero(good)[np.flatnonzero(holes)[0]]
                    self.findings.add(
                        "global access between a tensor's elements",
                        i,
                        f"thread {threads[which[t]]}: {size} bytes at {region.name} + "
                        f"{offsets[t] - first}; {np.count_nonzero(holes)} threads",
                    )
                    if write:
                        good[np.flatnonzero(good)[holes]] = False
            if write and not region.writable:
                self.findings.add("write to an input", i, region.name)
            if len(kinds) == 1 and good.all():
                result.append((region, offsets, which))
            else:
                result.append((region, offsets[good], which[good]))
        return result

    def load(
        self, i: Instruction, addresses: np.ndarray, unit: int, count: int, threads: np.ndarray
    ) -> np.ndarray:
        """``[count, N]`` of ``unit`` bytes."""
        size = unit * count
        out = np.full((count, len(addresses)), poison(unit))
        for region, offsets, which in self._groups(i, addresses, size, threads, False):
            if (offsets & (unit - 1)).any() or (offsets + size > len(region.views[1])).any():
                single = offsets[:, None] + np.arange(size)  # misaligned or at the very end
                values = region.memory[single].view(WORDS[unit]).T
            else:
                places = offsets >> SHIFT[unit]
                view = region.views[unit]
                values = np.stack([view.take(places + n) for n in range(count)])
            if unit >= 4:
                unwritten = POISON32 if unit == 4 else POISON64
                if (values == unwritten).any():
                    t = np.flatnonzero((values == unwritten).any(0))[0]
                    self.findings.add(
                        "global read before written", i, f"{region.name} + {offsets[t]}"
                    )
            if region.shadow is not None:
                single = offsets[:, None] + np.arange(size)
                mark = region.shadow[single]
                if ((mark != 0) & (mark != self.marker)).any():
                    self.findings.add("race between blocks: read", i, region.name)
            out[:, which] = values
        return out

    def store(
        self, i: Instruction, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray
    ) -> None:
        """``values [count, N]``."""
        unit, count = values.dtype.itemsize, len(values)
        size = unit * count
        for region, offsets, which in self._groups(i, addresses, size, threads, True):
            if not len(offsets):
                continue
            single = offsets[:, None] + np.arange(size)
            shadow = region.shadow_of()
            mark = shadow[single]
            if ((mark != 0) & (mark != self.marker)).any():
                self.findings.add("race between blocks: write", i, region.name)
            shadow[single] = self.marker
            mine = np.ascontiguousarray(values[:, which].T)  # [N, count]
            raw = mine.view(np.uint8).reshape(len(which), size)
            region.memory[single] = raw
            if (region.memory[single] != raw).any():
                self.findings.add("race: threads write different values", i, region.name)

    def update(
        self,
        i: Instruction,
        function: np.ufunc,
        addresses: np.ndarray,
        values: np.ndarray,
        threads: np.ndarray,
    ) -> None:
        """An atomic sum, maximum, ..., of what kind ``values [N]`` are."""
        kind = values.dtype
        for region, offsets, which in self._groups(i, addresses, kind.itemsize, threads, True):
            view = region.views[kind.itemsize].view(kind)
            function.at(view, offsets >> SHIFT[kind.itemsize], values[which])
