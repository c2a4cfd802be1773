"""CPU backend: skipped tiles cost nothing, and no compiler is needed.

numba compiles the loop over tiles on the user's machine around one register-blocked matrix kernel
written as LLVM vectors, because at 64 x 64 tiles that beats every library at hand: 97 GFLOPS per
core (AMD EPYC, AVX2) against 60 to 64 with numba's BLAS calls (OpenBLAS) and 80 to 83 with torch's
``sgemm`` (MKL), which pack their operands again at every call. Plain loops of torch calls lose to
dense SDPA even at 50 % skipped.

Threads are our own, one numba call per run of query tiles; every query tile is computed by one
thread in the order of its list, so neither the number of threads nor the split changes a bit.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...tiles import TileLists, TileShape
from ..base import Attended, Criterion, Rows, check_order, empty_out, pick
from ..pooled import Agreement, Pooled, audit_skipped

KERNELS = "_liteattention_cpu_kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = range(32, 257, 8)
# Packed keys and values of this many bytes live at once: bounds memory, not speed.
WORKSPACE_BYTES = 64 << 20

_importing = threading.Lock()

#: Called as (slot, head, start, stop), see :func:`_run_all`.
Task = Callable[[int, int, int, int], None]


class CpuBackend:
    """Tile attention on the CPU through numba. See :class:`~.base.Backend`."""

    name = "cpu"
    running_scores = False
    tile = TileShape(64, 64)

    def tile_shape(self, head_dim: int) -> TileShape:
        return self.tile

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if any(t.device.type != "cpu" for t in (q, k, v)):
            return "the tensors are not on the CPU"
        if any(t.dtype not in DTYPES or t.dtype != q.dtype for t in (q, k, v)):
            return f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: need one of float32, bfloat16, float16"
        if any(t.dim() != 4 for t in (q, k, v)) or k.shape != v.shape:
            return "q, k, v must be [B, H, L, D], with k and v of the same shape"
        if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
            return "q and k must have the same batch, heads and head_dim"
        if q.shape[3] not in HEAD_DIMS:
            return f"head_dim {q.shape[3]} is not a multiple of 8 from 32 to 256"
        if q.numel() == 0 or k.numel() == 0:
            return "there are no queries or no keys"
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            return "gradients are needed"
        kernels = _load_kernels()
        return kernels if isinstance(kernels, str) else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lists: TileLists | None = None,
        criterion: Criterion | None = None,
        order: Tensor | None = None,
    ) -> Attended:
        return self._attend(k, v, scale, (q, lists, criterion, order))[0]

    def forward_and_audit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lists: TileLists | None,
        criterion: Criterion | None,
        order: Tensor | None,
        audited: Rows,
    ) -> tuple[Attended, Attended]:
        """The keys are packed once."""
        some = (pick(q, audited), None, None, None)
        both = self._attend(k, v, scale, (q, lists, criterion, order), some)
        return both[0], both[1]

    def _attend(
        self,
        k: Tensor,
        v: Tensor,
        scale: float,
        *calls: tuple[Tensor, TileLists | None, Criterion | None, Tensor | None],
    ) -> list[Attended]:
        """One result for each of the ``calls``: queries, lists, criterion and order."""
        kernels = _load_kernels()
        if isinstance(kernels, str):
            raise RuntimeError(kernels)
        b, h, lk, d = k.shape
        tk = -(-lk // self.tile.k)
        d_padded = kernels.padded(d)
        bytes_per_head = 4 * tk * kernels.TILE * (d + d_padded)
        heads_at_once = min(b * h, max(1, WORKSPACE_BYTES // bytes_per_head))
        keys = _floats(heads_at_once, tk, kernels.TILE, d)
        values = _floats(heads_at_once, tk, d_padded // kernels.LANES, kernels.TILE, kernels.LANES)
        packing = _packing(kernels, k, v, keys, values)
        results, tasks = zip(
            *(_call(kernels, *call, lk, scale, keys, values) for call in calls), strict=True
        )
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:  # per call: safe after fork and in any thread
            for first in range(0, b * h, heads_at_once):
                heads = list(enumerate(range(first, min(first + heads_at_once, b * h))))
                _run_all(pool, packing, heads, _runs(tk, threads))
                for (q, *_), task in zip(calls, tasks, strict=True):
                    _run_all(pool, task, heads, _runs(-(-q.shape[2] // self.tile.q), 4 * threads))
        return list(results)

    def add_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        factor: Tensor,
        order: Tensor | None = None,
    ) -> None:
        """As :func:`~.pooled.add_skipped`, compiled."""
        kernels = _load_kernels()
        b, h, _, d = q.shape
        tk = pooled.keys.shape[2]
        chunks = -(-tk // kernels.TILE)
        d_padded = kernels.padded(d)
        keys = _floats(b * h, chunks, kernels.TILE, d)
        values = _floats(b * h, chunks, d_padded // kernels.LANES, kernels.TILE, kernels.LANES)
        q_heads, out_heads = _head_arrays(q), _head_arrays(kept.out)
        packing = _packing(kernels, pooled.keys, pooled.values, keys, values)
        lse_heads = kept.lse.flatten(0, 1).numpy()
        live_heads = live.flatten(0, 1).numpy()
        log_count = (pooled.log_count / math.log(2)).numpy()
        gains = factor.flatten().tolist()
        queries = _query_order(order, q.shape[2])

        def add(slot: int, head: int, start: int, stop: int) -> None:
            kernels.add_skipped(
                q_heads[head],
                queries,
                keys[slot],
                values[slot],
                log_count,
                live_heads[head],
                start,
                stop,
                scale * math.log2(math.e),
                gains[head],
                out_heads[head],
                lse_heads[head],
                _workspace(kernels, d, d_padded, visits=1),
            )

        heads = [(head, head) for head in range(b * h)]
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            _run_all(pool, packing, heads, [(0, chunks)])
            _run_all(pool, add, heads, _runs(live.shape[2], threads))

    def audit_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        full: Attended,
        audited: range,
        order: Tensor | None = None,
    ) -> Agreement:
        return audit_skipped(kept, q, pooled, scale, live, full, audited, self.tile, order)

    def tile_map(self, device: torch.device) -> None:
        return None


@lru_cache(maxsize=1)
def _load_kernels() -> Any:
    """The compiled kernels' module, or why it can't be had."""
    try:
        return _import_under_one_name()
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return "numba is not installed; `pip install numba` enables tile skipping on the CPU"
    except ImportError as error:  # such as a numba too old for this numpy
        return f"numba can't be loaded ({error}); tile skipping on the CPU needs it"


def _import_under_one_name() -> ModuleType:
    """``kernels``, always as the same module.

    numba's disk cache lies beside the file but remembers the module's name, and ComfyUI imports
    this package under another name than a script does. One thread runs the file, and others wait:
    they would find a module in which half of the kernels are missing.
    """
    with _importing:
        if KERNELS not in sys.modules:
            path = Path(__file__).with_name("kernels.py")
            spec = importlib.util.spec_from_file_location(KERNELS, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[KERNELS] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[KERNELS]
                raise
        return sys.modules[KERNELS]


def _floats(*shape: int) -> Any:
    """Uninitialised float32 numpy array, aligned to 64 bytes as torch does and numpy does not."""
    return torch.empty(shape, dtype=torch.float32, device="cpu").numpy()


def _workspace(kernels: Any, d: int, d_padded: int, visits: int) -> tuple[Any, ...]:
    """What one thread needs for one query tile at a time: ``work`` of ``kernels.attend``."""
    tile = kernels.TILE
    shapes = ((kernels.GROUPS, d, kernels.LANES), (tile, tile), (tile, d_padded))
    return tuple(_floats(*shape) for shape in (*shapes, (3, tile), (3, visits, tile)))


def _call(
    kernels: Any,
    q: Tensor,
    lists: TileLists | None,
    criterion: Criterion | None,
    order: Tensor | None,
    lk: int,
    scale: float,
    keys: Any,
    values: Any,
) -> tuple[Attended, Task]:
    """A result, and the task that fills it from packed keys and values: ``kernels.attend``."""
    b, h, lq, d = q.shape
    tq, tk = -(-lq // kernels.TILE), keys.shape[1]
    d_padded = values.shape[2] * kernels.LANES
    counts, index = _list_arrays(lists, b * h, tq, tk)
    out = empty_out(q)
    lse = torch.empty(b, h, lq, dtype=torch.float32, device="cpu")
    score = None
    if criterion:
        score = torch.full((b, h, tq, tk), -math.inf, dtype=torch.float32, device="cpu")
    q_heads, out_heads = _head_arrays(q), _head_arrays(out)
    lse_heads = lse.view(b * h, lq).numpy()
    score_heads = _floats(b * h, 0, tk) if score is None else score.view(-1, tq, tk).numpy()
    rule = {None: 0, "mass": kernels.MASS, "gap": kernels.GAP}[criterion]
    queries = _query_order(order, lq)

    def attend(slot: int, head: int, start: int, stop: int) -> None:
        kernels.attend(
            q_heads[head],
            queries,
            keys[slot],
            values[slot],
            counts[head],
            index[head],
            start,
            stop,
            lk,
            scale * math.log2(math.e),
            rule,
            out_heads[head],
            lse_heads[head],
            score_heads[head],
            _workspace(kernels, d, d_padded, visits=tk if rule else 1),
        )

    return Attended(out, lse, score), attend


def _packing(kernels: Any, k: Tensor, v: Tensor, keys: Any, values: Any) -> Task:
    """The task that packs ``k, v [B, H, L, D]`` into workspaces: see ``kernels.pack``."""
    k_heads, v_heads = _head_arrays(k), _head_arrays(v)

    def pack(slot: int, head: int, start: int, stop: int) -> None:
        kernels.pack(k_heads[head], v_heads[head], start, stop, keys[slot], values[slot])

    return pack


def _head_arrays(x: Tensor) -> list[Any]:
    """``x [B, H, L, D]`` -> B * H numpy views ``[L, D]``; 16-bit formats as their bits."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        array = x.view(torch.int16).numpy()
    elif x.dtype == torch.float16:
        array = x.numpy().view("uint16")
    else:
        array = x.numpy()
    return [head for sample in array for head in sample]


def _query_order(order: Tensor | None, lq: int) -> Any:
    """``[Lq]`` int64: the query of each row of the map."""
    if order is None:
        order = torch.arange(lq, device="cpu")
    check_order(order, lq)
    return order.contiguous().numpy()


def _list_arrays(lists: TileLists | None, heads: int, tq: int, tk: int) -> tuple[Any, Any]:
    """``counts [heads, Tq]`` and ``index [heads, Tq or 1, Tk]``, int32."""
    if lists is None:
        counts = torch.full((1, tq), tk, dtype=torch.int32, device="cpu").expand(heads, tq)
        every = torch.arange(tk, dtype=torch.int32, device="cpu").expand(heads, 1, tk)
        return counts.numpy(), every.numpy()
    if lists.count.numel() != heads * tq or lists.index.numel() != heads * tq * tk:
        raise ValueError(
            f"tile lists {tuple(lists.count.shape)}, {tuple(lists.index.shape)} don't fit "
            f"{heads} heads of {tq} x {tk} tiles"
        )
    counts = lists.count.to("cpu", torch.int32).reshape(heads, tq).contiguous()
    index = lists.index.to("cpu", torch.int32).reshape(heads, tq, tk).contiguous()
    return counts.numpy(), index.numpy()


def _runs(length: int, parts: int) -> list[tuple[int, int]]:
    """``range(length)`` cut into about ``parts`` runs ``(start, stop)``."""
    size = -(-length // parts)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _run_all(
    pool: ThreadPoolExecutor,
    task: Task,
    heads: list[tuple[int, int]],
    runs: list[tuple[int, int]],
) -> None:
    """``task(slot, head, start, stop)`` for all heads and runs in parallel; its errors surface."""
    jobs = [pool.submit(task, *head, *run) for head in heads for run in runs]
    for job in jobs:
        job.result()
