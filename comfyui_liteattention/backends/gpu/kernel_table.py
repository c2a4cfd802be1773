"""Which kernels exist, how they are cut and what they are called with: data, nothing that runs.

``kernels/build.py`` compiles this table, ``prebuilt.py`` launches it, ``jit.py`` compiles from it.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple, Protocol

from ...budget import allocation
from ...tiles import TileShape
from ..base import Criterion, Qk

#: One tile for every card and head_dim, so that maps and profiles mean the same everywhere.
TILE = TileShape(128, 64)

HEAD_DIMS = (64, 96, 128)
DTYPES = ("fp16", "bf16")
CRITERIA: tuple[Criterion | None, ...] = (None, "mass", "gap")


class Config(NamedTuple):
    """How one kernel is compiled: warps per block, key tiles in flight, and whether by the older
    of the two assemblers that triton brings for Blackwell."""

    warps: int
    stages: int
    older_assembler: bool = False


# Chosen from registers, spills and occupancy (kernels/inspect.py); no GPU has timed them yet.
# 4 warps at head_dim 64 read every key fragment half as often as 8 and leave room for two blocks
# on a multiprocessor; at 128 they spill. 100 kB of shared memory cap sm_86, 89 and 12x at 128.
_AMPERE = {64: Config(4, 3), 96: Config(8, 3), 128: Config(8, 3)}
_CONSUMER = {64: Config(4, 3), 96: Config(8, 2), 128: Config(8, 2)}
_HOPPER = {64: Config(8, 3), 96: Config(8, 3), 128: Config(8, 3)}
# With 4 warps a thread has a row to itself, and a quarter of the instructions is spared; beyond
# head_dim 64 they spill.
_BLACKWELL = {64: Config(4, 2), 96: Config(8, 3), 128: Config(8, 3)}
# Keys of 8 bits leave room for a third stage. On sm_12x the newer assembler spills.
_RTX50_INT8 = {64: Config(4, 3, True), 96: Config(8, 3, True), 128: Config(8, 3, True)}

#: q and k as multiplied -> compute capability, as major * 10 + minor -> head_dim -> configuration.
#: sm_103 has next to no INT8: its matrix unit lost it, and the old instruction is slow.
CONFIGS: dict[Qk, dict[int, dict[int, Config]]] = {
    "native": {
        80: _AMPERE,
        86: _CONSUMER,
        89: _CONSUMER,
        90: _HOPPER,
        100: _BLACKWELL,
        103: _BLACKWELL,
        120: _CONSUMER,
        121: _CONSUMER,
    },
    "int8": {
        80: _AMPERE,
        86: _AMPERE,
        89: _AMPERE,
        90: _HOPPER,
        100: _BLACKWELL,
        120: _RTX50_INT8,
        121: _RTX50_INT8,
    },
}
ARCHS = tuple(CONFIGS["native"])

#: Cards newer than this one that have no machine code of their own get its PTX, which the driver
#: compiles when it loads it.
PTX_ARCH = 86

#: What the compiled code takes for granted and the launcher must check: pointers in bytes (16-byte
#: loads), strides in elements of the model's dtype.
POINTER_ALIGNMENT = 16
STRIDE_ALIGNMENT = 8

#: Triton appends two pointers, for scratch memory that these kernels don't use.
TRAILING_POINTERS = 2


class Entry(NamedTuple):
    """A kernel's function in the Triton source.

    ``parameters`` are its arguments in order: (name, type). Types are Triton's; ``*io`` is the
    model's dtype and ``*qk`` that of q and k as they are multiplied.
    """

    name: str
    module: str
    parameters: tuple[tuple[str, str], ...]


def _strides(tensor: str) -> tuple[tuple[str, str], ...]:
    return ((f"{tensor}_batch", "i64"), (f"{tensor}_head", "i64"), (f"{tensor}_row", "i32"))


ATTEND = Entry(
    "attend_tiles",
    "attend",
    (
        *(("q", "*qk"), ("k", "*qk"), ("v", "*io"), ("out", "*io")),
        *(("lse", "*fp32"), ("score", "*fp32")),
        *(("count", "*i32"), ("index", "*i32")),
        *(("q_unit", "*fp32"), ("k_unit", "*fp32"), ("shift", "*fp32")),
        ("order", "*i64"),
        ("scale_log2", "fp32"),
        *(*_strides("q"), *_strides("k"), *_strides("v"), *_strides("out")),
        *((name, "i32") for name in ("heads", "lq", "lk", "tk", "ordered")),
    ),
)
QUANTISE_QUERIES = Entry(
    "quantise_queries",
    "quantise",
    (
        *(("q", "*io"), ("mean", "*fp32")),
        *(("values", "*i8"), ("unit", "*fp32"), ("shift", "*fp32")),
        ("scale", "fp32"),
        *_strides("q"),
        *((name, "i32") for name in ("heads", "lq")),
    ),
)
QUANTISE_KEYS = Entry(
    "quantise_keys",
    "quantise",
    (
        *(("k", "*io"), ("mean", "*fp32")),
        *(("values", "*i8"), ("unit", "*fp32")),
        *_strides("k"),
        *((name, "i32") for name in ("heads", "lk")),
    ),
)

MARK_TILES = Entry(
    "mark_tiles",
    "tile_map",
    (
        *(("live", "*i32"), ("score", "*fp32"), ("pinned", "*u8"), ("threshold", "*fp32")),
        ("following", "*i32"),
        *((name, "i32") for name in ("tq", "tk", "words")),
    ),
)
COUNT_SCORES = Entry(
    "count_scores",
    "tile_map",
    (
        *(("live", "*i32"), ("score", "*fp32"), ("pinned", "*u8"), ("counts", "*i64")),
        *((name, "i32") for name in ("tq", "tk", "words")),
    ),
)
CHOOSE_LIMIT = Entry(
    "choose_limit",
    "tile_map",
    (
        *(("counts", "*i64"), ("mass", "*fp64"), ("ledger", "*fp64"), ("lost", "*fp32")),
        *(("others", "*fp64"), ("limit", "*fp32"), ("after", "*fp64")),
        *((name, "i32") for name in ("query_tiles", "audited", "layers")),
        *((name, "fp32") for name in ("decay", "start", "prior_weight")),
        *((name, "fp32") for name in ("together", "alone", "too_much", "too_much_alone")),
    ),
)
LIST_TILES = Entry(
    "list_tiles",
    "tile_map",
    (
        *(("live", "*i32"), ("backwards", "*u8"), ("count", "*i32"), ("index", "*i32")),
        *((name, "i32") for name in ("tk", "words")),
    ),
)

ADD_SKIPPED = Entry(
    "add_skipped",
    "tail",
    (
        *(("q", "*io"), ("keys", "*io"), ("values", "*io"), ("out", "*io")),
        *(("lse", "*fp32"), ("live", "*i32"), ("factor", "*fp32"), ("order", "*i64")),
        ("scale_log2", "fp32"),
        *(*_strides("q"), *_strides("out")),
        *((name, "i32") for name in ("heads", "lq", "lk", "tk", "words", "ordered")),
    ),
)

AUDIT_SKIPPED = Entry(
    "audit_skipped",
    "tail",
    (
        *(("q", "*io"), ("keys", "*io"), ("values", "*io"), ("out", "*io"), ("lse", "*fp32")),
        *(("full_out", "*io"), ("full_lse", "*fp32"), ("live", "*i32"), ("order", "*i64")),
        *(("sums", "*fp32"), ("scale_log2", "fp32")),
        *(*_strides("q"), *_strides("out"), *_strides("full")),
        *((name, "i32") for name in ("heads", "lq", "lk", "tk", "words", "ordered")),
        *((name, "i32") for name in ("first_tile", "tq", "queries")),
    ),
)


class Kernel(Protocol):
    """One compiled kernel of one architecture; hashable."""

    @property
    def name(self) -> str:
        """Unique among all kernels."""
        ...

    @property
    def entry(self) -> Entry: ...

    @property
    def types(self) -> dict[str, str]:
        """What the types ``io`` and ``qk`` stand for."""
        ...

    def constants(self, tile: TileShape = TILE) -> dict[str, int | bool]:
        """The compile-time arguments."""
        ...

    def config(self, arch: int) -> Config | None:
        """How to compile for a compute capability; None: not there."""
        ...


class Variant(NamedTuple):
    """An attention kernel."""

    head_dim: int
    dtype: str
    lists: bool
    criterion: Criterion | None
    qk: Qk = "native"

    @property
    def name(self) -> str:
        mode = "" if self.qk == "native" else f"{self.qk}_"
        lists = "lists" if self.lists else "dense"
        return f"d{self.head_dim}_{self.dtype}_{mode}{lists}_{self.criterion or 'plain'}"

    @property
    def entry(self) -> Entry:
        return ATTEND

    @property
    def types(self) -> dict[str, str]:
        return {"io": self.dtype, "qk": "i8" if self.qk == "int8" else self.dtype}

    def constants(self, tile: TileShape = TILE) -> dict[str, int | bool]:
        return {
            "HEAD_DIM": self.head_dim,
            "PADDED_DIM": _padded(self.head_dim),
            "BM": tile.q,
            "BN": tile.k,
            "LISTS": self.lists,
            "CRITERION": CRITERIA.index(self.criterion),
            "INT8": self.qk == "int8",
        }

    def config(self, arch: int) -> Config | None:
        return CONFIGS[self.qk].get(arch, {}).get(self.head_dim)


class Companion(NamedTuple):
    """A kernel that works beside the attention kernel: makes q or k 8 bits wide before it, or adds
    or judges what skipped tiles contribute as means after it."""

    entry: Entry
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        return f"d{self.head_dim}_{self.dtype}_{self.entry.name}"

    @property
    def types(self) -> dict[str, str]:
        return {"io": self.dtype}

    def constants(self, tile: TileShape = TILE) -> dict[str, int | bool]:
        shape: dict[Entry, dict[str, int | bool]] = {
            QUANTISE_QUERIES: {"ROWS": QUERY_ROWS},
            QUANTISE_KEYS: {"ROWS": tile.k},
            ADD_SKIPPED: {"BM": tile.q, "BN": tile.k, "MEANS": MEANS},
            AUDIT_SKIPPED: {"BM": tile.q, "BN": tile.k, "MEANS": MEANS},
        }
        padded = _padded(self.head_dim)
        return {"HEAD_DIM": self.head_dim, "PADDED_DIM": padded} | shape[self.entry]

    def config(self, arch: int) -> Config | None:
        if self.entry in (ADD_SKIPPED, AUDIT_SKIPPED):
            # 4 warps at head_dim 64 spill on sm_12x; one pass over a few means needs no speed.
            return Config(8, 2) if arch in ARCHS else None
        return Config(4, 1) if arch in CONFIGS["int8"] else None


class MapKernel(NamedTuple):
    """A kernel that keeps the tile map. ``flag``: ALTERNATE of the lists, HAS_LIVE where scores are
    gone through."""

    entry: Entry
    flag: bool

    @property
    def name(self) -> str:
        return f"{self.entry.name}_{int(self.flag)}"

    @property
    def types(self) -> dict[str, str]:
        return {}

    def constants(self, tile: TileShape = TILE) -> dict[str, int | bool]:
        bins = {
            "PER_LOG2": allocation.PER_LOG2,
            "BINS": allocation.BINS,
            "PADDED_BINS": _padded(allocation.BINS),
        }
        rest: dict[Entry, dict[str, int | bool]] = {
            MARK_TILES: {"HAS_LIVE": self.flag, "WORDS": MAP_WORDS},
            LIST_TILES: {"ALTERNATE": self.flag, "WORDS": MAP_WORDS},
            COUNT_SCORES: {"HAS_LIVE": self.flag, "WORDS": MAP_WORDS, **bins},
            CHOOSE_LIMIT: {**bins},
        }
        return rest[self.entry]

    def config(self, arch: int) -> Config | None:
        return Config(4, 1) if arch in ARCHS else None


#: Tiles whose means are read at once.
MEANS = 64
#: Words of a map that one block works on at once.
MAP_WORDS = 32
#: Rows that one block quantises: any number, as each has a unit of its own.
QUERY_ROWS = 64


def _padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


VARIANTS = tuple(
    Variant(d, dtype, lists, criterion, qk)
    for qk, d, dtype, lists, criterion in product(
        CONFIGS, HEAD_DIMS, DTYPES, (False, True), CRITERIA
    )
)
QUANTISERS = tuple(
    Companion(*x) for x in product((QUANTISE_QUERIES, QUANTISE_KEYS), HEAD_DIMS, DTYPES)
)
MAP_KERNELS = (
    *(MapKernel(*x) for x in product((MARK_TILES, LIST_TILES, COUNT_SCORES), (False, True))),
    MapKernel(CHOOSE_LIMIT, False),
)
TAIL_KERNELS = tuple(
    Companion(*x) for x in product((ADD_SKIPPED, AUDIT_SKIPPED), HEAD_DIMS, DTYPES)
)
KERNELS: tuple[Kernel, ...] = (*VARIANTS, *QUANTISERS, *MAP_KERNELS, *TAIL_KERNELS)


def divisor(kernel: Kernel, name: str, type_: str) -> int:
    """What the compiled code takes for granted that an argument is a multiple of."""
    if type_.startswith("*"):
        # The map's are of any origin, scalars among them, and its kernels small.
        return 1 if kernel in MAP_KERNELS else POINTER_ALIGNMENT
    if not name.endswith(("_batch", "_head", "_row")):
        return 1
    # Rows of quantised q and k are packed: 16 bytes there are 16 elements.
    packed = kernel.types.get("qk") == "i8" and name[0] in "qk"
    return POINTER_ALIGNMENT if packed else STRIDE_ALIGNMENT
