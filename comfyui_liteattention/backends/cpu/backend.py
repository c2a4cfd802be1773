"""CPU backend: skipped tiles cost nothing, and no compiler is needed.

numba compiles the loop over tiles on the user's machine around one register-blocked matrix kernel
written as LLVM vectors, because at 64 x 64 tiles that beats every library at hand: 97 GFLOPS per
core (AMD EPYC, AVX2) against 60 to 64 with numba's BLAS calls (OpenBLAS) and 80 to 83 with torch's
``sgemm`` (MKL), which pack their operands again at every call. A loop of torch calls over tiles is
slower than dense SDPA even at 50 % skipped.

We start the threads ourselves, with one numba call per run of query tiles. Each query tile is
computed by one thread in the order of its list, so the number of threads and the split change
nothing in the result, bit for bit.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tiles import TileLists, TileShape
from .. import kernel_selftest
from ..base import (
    Agreement,
    Attended,
    Backend,
    Criterion,
    Inputs,
    Skipped,
    check_order,
    empty_out,
    some_of,
)
from ..constraints import Constraints
from ..pooled import PoolingBackend, audit_skipped
from . import cache

KERNELS = "_liteattention_cpu_kernels"
CONSTRAINTS = Constraints(
    device="cpu",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=range(32, 257, 8),
)
# Packed keys and values of this many bytes live at once: bounds memory, not speed.
WORKSPACE_BYTES = 64 << 20
LOG2E = math.log2(math.e)

_importing = threading.Lock()


class Task(NamedTuple):
    """Work for every head: ``do(slot, head, start, stop)`` for all parts of ``range(length)``. Each
    of the heads that are worked on at the same time has its own slot of the workspace."""

    do: Callable[[int, int, int, int], None]
    length: int


class CpuBackend(PoolingBackend):
    """Tile attention on the CPU through numba. See :class:`~..base.Backend`."""

    name = "cpu"
    running_scores = False
    tile = TileShape(64, 64)

    def __init__(self) -> None:
        self._verdicts = kernel_selftest.Verdicts()

    def tile_shape(self, head_dim: int) -> TileShape:
        return self.tile

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return CONSTRAINTS.check(q, k, v)

    def provide(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend | str:
        """Tested once, with the variant that compiles fastest: the code is the same for all."""
        kernels = _load_kernels()
        reason = kernels if isinstance(kernels, str) else None
        trial = kernel_selftest.Trial(64, torch.float32, device)
        return reason or self._verdicts.of(self, trial) or self

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        return self._attend((call, lists, criterion))[0]

    def forward_and_audit(
        self, call: Inputs, lists: TileLists, criterion: Criterion | None, audited: range
    ) -> tuple[Attended, Attended]:
        """Both results from keys and values that are packed only once."""
        kept, full = self._attend(
            (call, lists, criterion), (some_of(call, audited, self.tile), None, None)
        )
        return kept, full

    def _attend(self, *calls: tuple[Inputs, TileLists | None, Criterion | None]) -> list[Attended]:
        """One result for each of the ``calls``, which have the same keys and values."""
        kernels = _load_kernels()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        k, v = calls[0][0][1:3]
        packed = _pack(kernels, k, v, WORKSPACE_BYTES)
        every, at_once = k.shape[0] * k.shape[1], len(packed.keys)
        results, tasks = zip(*(_call(kernels, call, packed) for call in calls), strict=True)
        # A pool per call is safe after a fork and in any thread.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for first in range(0, every, at_once):
                heads = range(first, min(first + at_once, every))
                _run_all(pool, heads, [packed.task], tasks)
        return list(results)

    def add_skipped(self, kept: Attended, skipped: Skipped, factor: Tensor) -> None:
        """As :func:`~..pooled.add_skipped`, compiled."""
        kernels = _load_kernels()
        q, pooled, scale, live, order = skipped
        b, h, _, d = q.shape
        keys, values, packing = _pack(kernels, pooled.keys, pooled.values)
        q_array, out_array = _arrays(q, kept.out)
        lse, bits = kept.lse.numpy(), live.numpy()
        log_count = (pooled.log_count * LOG2E).numpy()
        gains = factor.tolist()
        queries = _query_order(order, q.shape[2])

        def add(slot: int, head: int, start: int, stop: int) -> None:
            at = divmod(head, h)
            kernels.add_skipped(
                q_array[at],
                queries,
                keys[slot],
                values[slot],
                log_count,
                bits[at],
                start,
                stop,
                scale * LOG2E,
                gains[at[0]][at[1]],
                out_array[at],
                lse[at],
                _workspace(kernels, d, visits=1),
            )

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            _run_all(pool, range(b * h), [packing], [Task(add, live.shape[2])])

    def audit_skipped(
        self, kept: Attended, skipped: Skipped, full: Attended, audited: range
    ) -> Agreement:
        return audit_skipped(kept, skipped, full, audited, self.tile)

    def tile_map(self, device: torch.device) -> None:
        return None


@lru_cache(maxsize=1)
def _load_kernels() -> Any:
    """The compiled kernels' module, or why it can't be loaded."""
    try:
        return _import_under_one_name()
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return "numba is not installed; `pip install numba` enables tile skipping on the CPU"
    except ImportError as error:  # such as a numba too old for this numpy
        return f"numba can't be loaded ({error}); tile skipping on the CPU needs it"


def _import_under_one_name() -> ModuleType:
    """Import ``kernels`` under one fixed name, whatever name the package itself was imported by.

    numba's files on disk contain the module's name, and ComfyUI imports this package under another
    name than a script does. Other threads wait for the import: otherwise they would find a module
    in which half of the kernels are still missing.
    """
    with _importing:
        if KERNELS not in sys.modules:
            path = Path(__file__).with_name("kernels.py")
            spec = importlib.util.spec_from_file_location(KERNELS, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[KERNELS] = module
            try:
                with cache.kept_apart():
                    spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[KERNELS]
                raise
        return sys.modules[KERNELS]


def _floats(*shape: int) -> Any:
    """Uninitialised float32 numpy array, aligned to 64 bytes as torch does and numpy does not."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").numpy()


class Packed(NamedTuple):
    """Memory for the packed keys and values of as many heads as are worked on at once, and the task
    that fills it: see ``kernels.pack``."""

    keys: Any
    values: Any
    task: Task


def _pack(kernels: Any, k: Tensor, v: Tensor, most_bytes: int | None = None) -> Packed:
    """Memory for ``k, v [B, H, L, D]``: all heads, or as many as fit in ``most_bytes``."""
    b, h, length, d = k.shape
    tk, d_padded = -(-length // kernels.TILE), kernels.padded(d)
    heads = b * h
    if most_bytes is not None:
        heads = min(heads, max(1, most_bytes // (4 * tk * kernels.TILE * (d + d_padded))))
    keys = torch.empty(heads, tk, kernels.TILE, d, dtype=torch.float32, device="cpu").numpy()
    groups = (heads, tk, d_padded // kernels.LANES, kernels.TILE, kernels.LANES)
    values = torch.empty(groups, dtype=torch.float32, device="cpu").numpy()
    k_array, v_array = _arrays(k, v)

    def pack(slot: int, head: int, start: int, stop: int) -> None:
        at = divmod(head, h)
        kernels.pack(k_array[at], v_array[at], start, stop, keys[slot], values[slot])

    return Packed(keys, values, Task(pack, tk))


def _workspace(kernels: Any, d: int, visits: int) -> tuple[Any, ...]:
    """What one thread needs for one query tile at a time: ``work`` of ``kernels.attend``."""
    tile = kernels.TILE
    shapes = ((kernels.GROUPS, d, kernels.LANES), (tile, tile), (tile, kernels.padded(d)))
    return tuple(_floats(*shape) for shape in (*shapes, (3, tile), (3, visits, tile)))


def _call(
    kernels: Any,
    made: tuple[Inputs, TileLists | None, Criterion | None],
    packed: Packed,
) -> tuple[Attended, Task]:
    """A result, and the task that fills it from packed keys and values: ``kernels.attend``."""
    (q, k, _, scale, order, _), lists, criterion = made
    keys, values, _ = packed
    b, h, lq, d = q.shape
    if order is not None:
        check_order(order, lq)
    tq, tk = -(-lq // kernels.TILE), keys.shape[1]
    counts, index = _list_arrays(lists, (b, h, tq, tk))
    out = empty_out(q)
    lse = torch.empty(b, h, lq, dtype=torch.float32, device="cpu")
    score = torch.full(
        (b, h, tq if criterion else 0, tk), -math.inf, dtype=torch.float32, device="cpu"
    )
    q_array, out_array = _arrays(q, out)
    lse_array, score_array = lse.numpy(), score.numpy()
    rule = {None: 0, "mass": kernels.MASS, "gap": kernels.GAP}[criterion]
    queries = _query_order(order, lq)

    def attend(slot: int, head: int, start: int, stop: int) -> None:
        at = divmod(head, h)
        kernels.attend(
            q_array[at],
            queries,
            keys[slot],
            values[slot],
            counts[at],
            index[at],
            start,
            stop,
            k.shape[2],
            scale * LOG2E,
            rule,
            out_array[at],
            lse_array[at],
            score_array[at],
            _workspace(kernels, d, visits=tk if rule else 1),
        )

    return Attended(out, lse, score if criterion else None), Task(attend, tq)


def _arrays(one: Tensor, other: Tensor) -> tuple[Any, Any]:
    """Two tensors ``[B, H, L, D]`` of one dtype as numpy views; 16-bit formats as their bits."""
    one, other = one.detach(), other.detach()
    if one.dtype == torch.bfloat16:
        one, other = one.view(torch.int16), other.view(torch.int16)
    if one.dtype == torch.float16:
        return one.numpy().view("uint16"), other.numpy().view("uint16")
    return one.numpy(), other.numpy()


def _query_order(order: Tensor | None, lq: int) -> Any:
    """``[Lq]`` int64: the query of each row of the map."""
    rows = torch.arange(lq, device="cpu") if order is None else order.contiguous()
    return rows.numpy()


def _list_arrays(lists: TileLists | None, shape: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """``counts [B, H, Tq]`` and ``index [B, H, Tq or 1, Tk]``, int32, for a map of this shape."""
    b, h, tq, tk = shape
    if lists is None:
        counts = torch.full((1, 1, tq), tk, dtype=torch.int32, device="cpu").expand(b, h, tq)
        every = torch.arange(tk, dtype=torch.int32, device="cpu").expand(b, h, 1, tk)
        return counts.numpy(), every.numpy()
    if lists.count.numel() != b * h * tq or lists.index.numel() != b * h * tq * tk:
        raise ValueError(
            f"tile lists {tuple(lists.count.shape)}, {tuple(lists.index.shape)} don't fit "
            f"{b * h} heads of {tq} x {tk} tiles"
        )
    counts = lists.count.to("cpu", torch.int32).reshape(b, h, tq).contiguous()
    index = lists.index.to("cpu", torch.int32).reshape(b, h, tq, tk).contiguous()
    return counts.numpy(), index.numpy()


def _run_all(pool: ThreadPoolExecutor, heads: range, *stages: Sequence[Task]) -> None:
    """Run one stage after the other, the tasks of a stage for all heads in parallel, split into
    more parts than there are threads. An error in any part is raised here."""
    parts = 4 * torch.get_num_threads()
    for tasks in stages:
        jobs = [
            pool.submit(task.do, slot, head, start, min(start + size, task.length))
            for task in tasks
            for size in (-(-task.length // parts),)
            for slot, head in enumerate(heads)
            for start in range(0, task.length, size)
        ]
        for job in jobs:
            job.result()
