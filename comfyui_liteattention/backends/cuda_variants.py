"""Which kernels exist, how they are cut and what they are called with: data, nothing that runs.

``kernels/build.py`` compiles this table, ``cuda.py`` launches it, ``triton.py`` compiles from it.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from ..tiles import TileShape
from .base import Criterion

#: One tile for every card and head_dim, so that maps and profiles mean the same everywhere.
TILE = TileShape(128, 64)

HEAD_DIMS = (64, 96, 128)
DTYPES = ("fp16", "bf16")
CRITERIA: tuple[Criterion | None, ...] = (None, "mass", "gap")


class Config(NamedTuple):
    """How one kernel is compiled: warps per block, and key tiles in flight."""

    warps: int
    stages: int


# Chosen from registers, spills and occupancy (kernels/inspect.py); no GPU has timed them yet.
# 4 warps at head_dim 64 read every key fragment half as often as 8 and leave room for two blocks
# on a multiprocessor; at 128 they spill. 100 kB of shared memory cap sm_86, 89 and 12x at 128.
_AMPERE = {64: Config(4, 3), 96: Config(8, 3), 128: Config(8, 3)}
_CONSUMER = {64: Config(4, 3), 96: Config(8, 2), 128: Config(8, 2)}
_DATACENTER = {64: Config(8, 3), 96: Config(8, 3), 128: Config(8, 3)}

#: Compute capability, as major * 10 + minor -> head_dim -> configuration.
CONFIGS: dict[int, dict[int, Config]] = {
    80: _AMPERE,
    86: _CONSUMER,
    89: _CONSUMER,
    90: _DATACENTER,
    100: _DATACENTER,
    103: _DATACENTER,
    120: _CONSUMER,
    121: _CONSUMER,
}

#: Cards newer than this one that have no machine code of their own get its PTX, which the driver
#: compiles when it loads it.
PTX_ARCH = 86

#: The kernel's arguments in order: (name, type). Types are Triton's; ``*io`` is q's dtype.
PARAMETERS: tuple[tuple[str, str], ...] = (
    *((name, "*io") for name in ("q", "k", "v", "out")),
    *((name, "*fp32") for name in ("lse", "score")),
    *((name, "*i32") for name in ("count", "index")),
    ("scale_log2", "fp32"),
    *(
        (f"{tensor}_{axis}", "i32" if axis == "row" else "i64")
        for tensor in ("q", "k", "v", "out")
        for axis in ("batch", "head", "row")
    ),
    *((name, "i32") for name in ("heads", "lq", "lk", "tk")),
)

#: What the compiled code takes for granted and the launcher must check: pointers in bytes (16-byte
#: loads), strides in elements.
POINTER_ALIGNMENT = 16
STRIDE_ALIGNMENT = 8

#: Triton appends two pointers, for scratch memory that these kernels don't use.
TRAILING_POINTERS = 2

ENTRY = "attend_tiles"


class Variant(NamedTuple):
    """One compiled kernel of one architecture."""

    head_dim: int
    dtype: str
    lists: bool
    criterion: Criterion | None

    @property
    def name(self) -> str:
        lists = "lists" if self.lists else "dense"
        return f"d{self.head_dim}_{self.dtype}_{lists}_{self.criterion or 'plain'}"

    def constants(self, tile: TileShape = TILE) -> dict[str, int | bool]:
        """The kernel's compile-time arguments."""
        return {
            "HEAD_DIM": self.head_dim,
            "PADDED_DIM": 1 << (self.head_dim - 1).bit_length(),
            "BM": tile.q,
            "BN": tile.k,
            "LISTS": self.lists,
            "CRITERION": CRITERIA.index(self.criterion),
        }


VARIANTS = tuple(Variant(*v) for v in product(HEAD_DIMS, DTYPES, (False, True), CRITERIA))
