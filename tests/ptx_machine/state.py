"""All that a running block of threads has: registers, memory, what is under way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .findings import Findings
from .global_memory import Global
from .ptx import Instruction, Kernel
from .shared_memory import Shared

_STORAGE: dict[str, Any] = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16}
_STORAGE |= {"b32": np.uint32, "b64": np.uint64, "f32": np.uint32, "f64": np.uint64}


class Registers:
    """``[how many, threads]`` for each kind of register."""

    def __init__(self, declared: dict[str, tuple[str, int]], threads: int) -> None:
        self.files = {
            prefix: np.zeros((count, threads), _STORAGE[kind])
            for prefix, (kind, count) in declared.items()
        }

    def row(self, name: str) -> np.ndarray:
        """One register of all threads."""
        if name in self.files:  # declared alone, without a number
            return self.files[name][0]
        prefix = name.rstrip("0123456789")
        return self.files[prefix][int(name[len(prefix) :])]

    def poison(self) -> None:
        """As before anything was written."""
        for file in self.files.values():
            width = 8 * file.itemsize
            file.fill(False if file.dtype == bool else 0xA5A5A5A5A5A5A5A5 >> (64 - width))


class Copy(NamedTuple):
    """An asynchronous copy to shared memory: ``data [N, size]`` bytes for ``offsets [N]``."""

    threads: np.ndarray
    offsets: np.ndarray
    data: np.ndarray
    instruction: Instruction


class Product(NamedTuple):
    """A product of matrices that is under way (wgmma). ``copies``: what its ``sources`` held when
    it began; ``pinned``: the shared memory that it reads."""

    names: tuple[str, ...]
    rows: list[np.ndarray]
    sources: list[np.ndarray]
    copies: list[np.ndarray]
    pinned: list[np.ndarray]


@dataclass
class Products:
    """Registers have a wgmma's result only once it was waited for; till then it is ``held``."""

    groups: list[list[Product]] = field(default_factory=list)
    open: list[Product] = field(default_factory=list)
    held: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)


class State:
    """Of one block of a kernel; used for one block after another."""

    def __init__(self, kernel: Kernel, shared: int, findings: Findings, shared_base: int) -> None:
        self.kernel, self.findings = kernel, findings
        self.threads = kernel.threads
        self.registers = Registers(kernel.registers, kernel.threads)
        self.shared = Shared(shared, shared_base, findings)
        self.memory = Global({}, findings)
        self.parameters: dict[str, bytes] = {}
        self.block = np.zeros((3, 1), np.uint32)
        self.grid = np.ones((3, 1), np.uint32)
        lanes = np.arange(kernel.threads, dtype=np.uint32)
        self.tid = lanes.astype(np.int64)
        zero = np.zeros(1, np.uint32)
        self.special: dict[str, np.ndarray] = {
            "%tid.x": lanes,
            "%tid.y": zero,
            "%tid.z": zero,
            "%laneid": lanes & np.uint32(31),
            "%warpid": lanes >> np.uint32(5),
            "%ntid.x": np.full(1, kernel.threads, np.uint32),
        }
        for n, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = self.block[n]
            self.special[f"%nctaid.{axis}"] = self.grid[n]
        self.symbols = {kernel.shared_symbol: shared_base} if kernel.shared_symbol else {}
        self.copies: list[list[Copy]] = []  # committed groups, the oldest first
        self.open_copies: list[Copy] = []
        self.products = Products()

    def begin(self, x: int, y: int) -> None:
        """Make ready for a block."""
        self.block[:, 0] = (x, y, 0)
        self.findings.block = (x, y)
        self.memory.marker = (y * int(self.grid[0, 0]) + x) % 254 + 1
        self.registers.poison()
        self.shared.clear()
        self.copies, self.open_copies, self.products = [], [], Products()
