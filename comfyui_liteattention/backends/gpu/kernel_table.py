"""Which kernels exist, how they are cut and what they are called with: data, nothing that runs.

``kernels/build.py`` compiles this table, ``prebuilt.py`` launches it, ``jit.py`` compiles from it.
"""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple, Protocol

from ...budget import allocation
from ...tiles import TileShape
from ..base import Criterion, Mode

#: One tile for every card and head_dim, so that maps and profiles mean the same everywhere.
TILE = TileShape(128, 64)

HEAD_DIMS = (64, 96, 128)
DTYPES = ("fp16", "bf16")
CRITERIA: tuple[Criterion | None, ...] = (None, "mass", "gap")
#: Those of them that prebuilt kernels have. The peak gap is there for comparison with the paper.
PREBUILT_CRITERIA: tuple[Criterion | None, ...] = (None, "mass")

#: How p v is multiplied: in the dtype of v with float32 sums, or scaled and in fp16 or e4m3 with
#: fp16 sums inside a key tile (kernels/values.py).
Values = Literal["own", "fp16", "e4m3"]
VALUES: tuple[Values, ...] = ("own", "fp16", "e4m3")
#: log2 of what the largest p is scaled to. In fp16, p, values and sums of 64 take 15 of the 16
#: octaves that there are; one is left free (see kernels/attend.py).
LIFT: dict[Values, int] = {"own": 0, "fp16": 7, "e4m3": 8}
#: log2 of what values in fp16 stay below.
TOP = 2
#: What the largest value of a channel becomes in e4m3, as in SageAttention2++ (arXiv 2505.21136).
#: Sums of 64 can't overflow: p in e4m3 ends at 448.
LARGEST_E4M3 = 2.25


class Method(NamedTuple):
    """How a kernel multiplies: q k in 8 bits or in the model's dtype, and p v."""

    int8: bool = False
    values: Values = "own"

    @property
    def name(self) -> str:
        """``int8_fp16`` and the like; empty where all is in the model's dtype."""
        parts = ("int8" if self.int8 else "", "" if self.values == "own" else self.values)
        return "_".join(filter(None, parts))


#: All in the model's dtype.
NATIVE = Method()


class Config(NamedTuple):
    """How one kernel is compiled: warps per block, and key tiles in flight."""

    warps: int
    stages: int


class Archive(NamedTuple):
    """A file of compiled kernels: for which compute capability (major * 10 + minor), and by which
    of the two assemblers that triton brings. The newer one asks for a newer driver."""

    arch: int
    newer_assembler: bool = False


#: The newer assembler makes loops 4 to 8 % shorter on sm_120 (kernels/README.md). So of RTX 50 both
#: are here, for drivers before 580 as well; a Spark comes with 580.
ARCHIVES = {
    **{f"sm_{arch}": Archive(arch) for arch in (80, 86, 89, 90, 100, 103)},
    "sm_120_older": Archive(120),
    **{f"sm_{arch}": Archive(arch, newer_assembler=True) for arch in (120, 121)},
}
#: Compute capabilities that the tables below know. Those without an archive get PTX, or triton.
ARCHS = (80, 86, 89, 90, 100, 103, 120, 121)
#: Cards that sum in fp16 twice as fast as in float32.
_RTX = (86, 89, 120, 121)

#: Mode -> compute capability, as major * 10 + minor -> method. sm_103 has next to no INT8: its
#: matrix unit lost it, and the old instruction is slow. e4m3 with fp16 sums starts with sm_89.
METHODS: dict[Mode, dict[int, Method]] = {
    "native": {arch: Method(values="fp16" if arch in _RTX else "own") for arch in ARCHS},
    "int8": {
        arch: Method(True, "fp16" if arch in _RTX else "own") for arch in ARCHS if arch != 103
    },
    "fp8": {arch: Method(True, "e4m3") for arch in (89, 120, 121)},
}


# Chosen from registers, spills and occupancy (kernels/inspect.py); no GPU has timed them yet.
# 4 warps at head_dim 64 read every key fragment half as often as 8 and leave room for two blocks
# on a multiprocessor; at 128 they spill, and on RTX 50 at 64 as well. 100 kB of shared memory cap
# sm_86, 89 and 12x at 128.
_AMPERE = {64: Config(4, 3), 96: Config(8, 3), 128: Config(8, 3)}
_RTX_30_40 = {64: Config(4, 3), 96: Config(8, 2), 128: Config(8, 2)}
_RTX_50 = {64: Config(8, 3), 96: Config(8, 2), 128: Config(8, 2)}
_HOPPER = {64: Config(8, 3), 96: Config(8, 3), 128: Config(8, 3)}
# With 4 warps a thread has a row to itself, and a quarter of the instructions is spared; beyond
# head_dim 64 they spill.
_BLACKWELL = {64: Config(4, 2), 96: Config(8, 3), 128: Config(8, 3)}
#: head_dims that the modes in 8 bits have: the rotation takes powers of two.
_IN_8_BITS = (64, 128)
_CONSUMER = {86: _RTX_30_40, 89: _RTX_30_40, 120: _RTX_50, 121: _RTX_50}
_CONSUMER_8 = {
    arch: {head_dim: configs[head_dim] for head_dim in _IN_8_BITS}
    for arch, configs in _CONSUMER.items()
}

#: Method -> compute capability -> head_dim -> configuration.
CONFIGS: dict[Method, dict[int, dict[int, Config]]] = {
    NATIVE: {
        **_CONSUMER,
        **{80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL, 103: _BLACKWELL},
    },
    Method(values="fp16"): _CONSUMER,
    Method(True): {
        arch: {head_dim: configs[head_dim] for head_dim in _IN_8_BITS}
        for arch, configs in ((80, _AMPERE), (90, _HOPPER), (100, _BLACKWELL))
    },
    Method(True, "fp16"): _CONSUMER_8,
    Method(True, "e4m3"): {arch: _CONSUMER_8[arch] for arch in (89, 120, 121)},
}


def method(mode: Mode, arch: int, head_dim: int, dtype: str) -> Method | None:
    """How a card multiplies in a mode, or None: not there. Models in fp16 keep float32 sums in
    native mode: against their own error, an eighth of that in bf16, sums in fp16 are too much."""
    found = METHODS[mode].get(arch)
    if found is not None and mode == "native" and dtype == "fp16":
        found = NATIVE
    return found if found is not None and head_dim in CONFIGS[found].get(arch, ()) else None


def _methods(arch: int, head_dim: int, dtype: str) -> list[Method]:
    """All that a card uses, in any mode."""
    found = (method(mode, arch, head_dim, dtype) for mode in METHODS)
    return [one for one in found if one is not None]


#: Cards newer than this one that have no machine code of their own get its PTX, which the driver
#: compiles when it loads it.
PTX_ARCH = 86
#: Version of PTX that is enough for all kernels there. triton would say 8.8, which asks for driver
#: 575 instead of 525.
PTX_VERSION = 80

#: What the compiled code takes for granted and the launcher must check: pointers in bytes (16-byte
#: loads), strides in elements of the model's dtype.
POINTER_ALIGNMENT = 16
STRIDE_ALIGNMENT = 8

#: Triton appends two pointers, for scratch memory that these kernels don't use.
TRAILING_POINTERS = 2


class Entry(NamedTuple):
    """A kernel's function in the Triton source.

    ``parameters`` are its arguments in order: (name, type). Types are Triton's; ``*io`` is the
    model's dtype, ``*qk`` that of q and k and ``*pv`` that of v as they are multiplied.
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
        *(("q", "*qk"), ("k", "*qk"), ("v", "*pv"), ("out", "*io")),
        *(("lse", "*fp32"), ("score", "*fp32")),
        *(("count", "*i32"), ("index", "*i32")),
        *(("q_unit", "*fp32"), ("k_unit", "*fp32"), ("shift", "*fp32"), ("v_unit", "*fp32")),
        *(("full_out", "*io"), ("full_lse", "*fp32"), ("every", "*i32"), ("order", "*i64")),
        ("scale_log2", "fp32"),
        *(*_strides("q"), *_strides("k"), *_strides("v"), *_strides("out")),
        *((name, "i32") for name in ("heads", "lq", "lk", "tk", "ordered")),
        *((name, "i32") for name in ("first_audited", "audited", "queries")),
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
        *(("values", "*i8"), ("unit", "*fp32"), ("means", "*io"), ("order", "*i64")),
        *_strides("k"),
        *((name, "i32") for name in ("heads", "lk", "ordered")),
    ),
)

PEAK_VALUES = Entry(
    "peak_values",
    "values",
    (
        *(("v", "*io"), ("peak", "*i32")),
        *_strides("v"),
        *((name, "i32") for name in ("heads", "lk")),
    ),
)
SCALE_VALUES = Entry(
    "scale_values",
    "values",
    (
        *(("v", "*io"), ("peak", "*i32"), ("values", "*pv"), ("unit", "*fp32")),
        *(("means", "*io"), ("order", "*i64")),
        *_strides("v"),
        *((name, "i32") for name in ("heads", "lk", "ordered")),
    ),
)

MARK_TILES = Entry(
    "mark_tiles",
    "tile_map",
    (
        *(("live", "*i32"), ("score", "*fp32"), ("pinned", "*u8"), ("limit", "*fp32")),
        *(("all_back", "*u8"), ("following", "*i32")),
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
        *(("others", "*fp64"), ("limit", "*fp32"), ("all_back", "*u8"), ("after", "*fp64")),
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

    def constants(self, tile: TileShape = TILE) -> dict[str, float]:
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
    method: Method = NATIVE

    @property
    def name(self) -> str:
        lists = "lists" if self.lists else "dense"
        parts = (f"d{self.head_dim}", self.dtype, self.method.name, lists)
        return "_".join([*filter(None, parts), self.criterion or "plain"])

    @property
    def entry(self) -> Entry:
        return ATTEND

    @property
    def types(self) -> dict[str, str]:
        qk = "i8" if self.method.int8 else self.dtype
        return {"io": self.dtype, "qk": qk, "pv": _stored(self.method.values, self.dtype)}

    def constants(self, tile: TileShape = TILE) -> dict[str, float]:
        return {
            "HEAD_DIM": self.head_dim,
            "PADDED_DIM": _padded(self.head_dim),
            "BM": tile.q,
            "BN": tile.k,
            "LISTS": self.lists,
            "CRITERION": CRITERIA.index(self.criterion),
            "INT8": self.method.int8,
            "VALUES": VALUES.index(self.method.values),
            "LIFT": LIFT[self.method.values],
        }

    def config(self, arch: int) -> Config | None:
        used = _methods(arch, self.head_dim, self.dtype)
        return CONFIGS[self.method][arch][self.head_dim] if self.method in used else None


class Companion(NamedTuple):
    """A kernel that works beside the attention kernel: makes q, k or v narrower before it, or adds
    or judges what skipped tiles contribute as means after it. ``values``: see :data:`VALUES`."""

    entry: Entry
    head_dim: int
    dtype: str
    values: Values = "own"

    @property
    def name(self) -> str:
        to = "" if self.values == "own" else f"_{self.values}"
        return f"d{self.head_dim}_{self.dtype}_{self.entry.name}{to}"

    @property
    def types(self) -> dict[str, str]:
        return {"io": self.dtype, "pv": _stored(self.values, self.dtype)}

    def constants(self, tile: TileShape = TILE) -> dict[str, float]:
        shape: dict[Entry, dict[str, float]] = {
            QUANTISE_QUERIES: {"ROWS": QUERY_ROWS},
            QUANTISE_KEYS: {"ROWS": tile.k},
            PEAK_VALUES: {"ROWS": tile.k},
            SCALE_VALUES: {
                "ROWS": tile.k,
                "E4M3": self.values == "e4m3",
                "TOP": TOP,
                "LARGEST": LARGEST_E4M3,
            },
            ADD_SKIPPED: {"BM": tile.q, "BN": tile.k, "MEANS": MEANS},
            AUDIT_SKIPPED: {"BM": tile.q, "BN": tile.k, "MEANS": MEANS},
        }
        padded = _padded(self.head_dim)
        return {"HEAD_DIM": self.head_dim, "PADDED_DIM": padded} | shape[self.entry]

    def config(self, arch: int) -> Config | None:
        if arch not in ARCHS:
            return None
        if self.entry in (ADD_SKIPPED, AUDIT_SKIPPED):
            # 4 warps at head_dim 64 spill on sm_12x; one pass over a few means needs no speed.
            return Config(8, 2)
        served = _methods(arch, self.head_dim, self.dtype)
        if self.entry in (QUANTISE_QUERIES, QUANTISE_KEYS):
            needed = any(m.int8 for m in served)
        elif self.entry == PEAK_VALUES:
            needed = any(m.values != "own" for m in served)
        else:
            needed = self.values in [m.values for m in served]
        return Config(4, 1) if needed else None


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

    def constants(self, tile: TileShape = TILE) -> dict[str, float]:
        bins = {
            "PER_LOG2": allocation.PER_LOG2,
            "BINS": allocation.BINS,
            "PADDED_BINS": _padded(allocation.BINS),
        }
        rest: dict[Entry, dict[str, float]] = {
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


def _stored(values: Values, dtype: str) -> str:
    """Triton's type of v as it is multiplied."""
    return {"own": dtype, "fp16": "fp16", "e4m3": "fp8e4nv"}[values]


#: Compiled ahead of time, for the cards that multiply so in some mode.
VARIANTS = tuple(
    Variant(d, dtype, lists, criterion, way)
    for way, d, dtype, lists, criterion in product(
        CONFIGS, HEAD_DIMS, DTYPES, (False, True), PREBUILT_CRITERIA
    )
    if any(d in configs for configs in CONFIGS[way].values())
)
QUANTISERS = (
    *(Companion(*x) for x in product((QUANTISE_QUERIES, QUANTISE_KEYS), _IN_8_BITS, DTYPES)),
    *(Companion(PEAK_VALUES, *x) for x in product(HEAD_DIMS, DTYPES)),
    *(Companion(SCALE_VALUES, *x, "fp16") for x in product(HEAD_DIMS, DTYPES)),
    *(Companion(SCALE_VALUES, *x, "e4m3") for x in product(_IN_8_BITS, DTYPES)),
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
    # What has one byte an element is packed: 16 bytes there are 16 elements.
    packed = kernel.types.get("qk") == "i8" and name[0] in "qk"
    packed |= kernel.types.get("pv") == "fp8e4nv" and kernel.entry == ATTEND and name[0] == "v"
    return POINTER_ALIGNMENT if packed else STRIDE_ALIGNMENT
