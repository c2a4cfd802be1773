"""How fast the kernel is on a graphics card, against each SDPA backend of torch.

    python -m benchmarks.speed_gpu [--json FILE] [--tokens 32768 75600] [--head-dim 64 128]
                                   [--heads 12] [--backend cuda triton] [--repeats 20]

A ratio is our time / theirs, below 1 is faster, the median over pairs of calls that took turns.
TFLOPS count the tiles that were computed. "0 %" reads a list that names every tile and writes the
mass scores, as while sampling; "dense" does neither. "-int8" multiplies q and k in 8 bits, and its
times include what makes them so. At the end, milliseconds of what goes with the kernel: quantising
alone, and the tile map (scores to bits to lists) with torch and with its own kernels.
**Never run yet: no GPU was at hand.**
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from comfyui_liteattention import policy
from comfyui_liteattention.backends import kernel_call
from comfyui_liteattention.backends.base import Backend
from comfyui_liteattention.backends.cuda import CudaBackend
from comfyui_liteattention.backends.pooled import pool
from comfyui_liteattention.backends.triton import TritonBackend
from comfyui_liteattention.tiles import TileLists, make_lists, pack, unpack

SKIPPED = (0.0, 0.25, 0.5, 0.75, 0.9)
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS: dict[str, Callable[[], CudaBackend | TritonBackend]] = {
    "cuda": CudaBackend,
    "cuda-int8": partial(CudaBackend, "int8"),
    "triton": TritonBackend,
    "triton-int8": partial(TritonBackend, "int8"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Call = Callable[[], object]


def milliseconds(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Each call ``repeats`` times, taking turns, after two untimed rounds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if repeat >= 2:
                times[name].append(start.elapsed_time(end))
    return times


def random_lists(backend: Backend, q: Tensor, skipped: float) -> tuple[TileLists, float]:
    """As many random tiles in every row; also the share of tiles that they are."""
    tq, tk = backend.tile_shape(q.shape[-1]).grid(q.shape[2], q.shape[2])
    live = max(1, round(tk * (1 - skipped)))
    order = torch.rand(*q.shape[:2], tq, tk, device=q.device).argsort(-1)
    return make_lists(order < live), live / tk


def sdpa_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    """The backends of torch that take these tensors."""
    calls: dict[str, Call] = {}
    for name, choice in SDPA.items():

        def call(choice: SDPBackend = choice) -> Tensor:
            with sdpa_kernel(choice):
                return scaled_dot_product_attention(q, k, v)

        try:
            call()
        except RuntimeError:
            continue
        calls[name] = call
    return calls


def our_calls(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Call], dict[str, float]]:
    """Dense and at each share skipped; and the share of the tiles that each computes."""
    scale = q.shape[-1] ** -0.5
    calls: dict[str, Call] = {"dense": partial(backend.forward, q, k, v, scale)}
    computed = {"dense": 1.0}
    for skipped in SKIPPED:
        lists, share = random_lists(backend, q, skipped)
        name = f"{skipped:.0%}"
        calls[name] = partial(backend.forward, q, k, v, scale, lists, "mass")
        computed[name] = share
    return calls, computed


def measure(
    backend: Backend, tokens: int, head_dim: int, heads: int, dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """One row for dense and for each share skipped."""
    shape = (1, tokens, heads, head_dim)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=DTYPES[dtype]).transpose(1, 2) for _ in range(3)
    )
    case = {"backend": backend.name, "tokens": tokens, "head_dim": head_dim, "dtype": dtype}
    if reason := backend.unsupported(q, k, v):
        return [case | {"unsupported": reason}]
    theirs = sdpa_calls(q, k, v)
    ours, computed = our_calls(backend, q, k, v)
    times = milliseconds(theirs | ours, repeats)
    # Two matrix products, two operations for each multiply-add.
    tera = 4 * heads * tokens**2 * head_dim * 1e-12
    rows = []
    for name in ours:
        median = statistics.median(times[name])
        ratios = {
            other: statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
            for other in theirs
        }
        rows.append(
            case
            | {"skipped": name, "computed": computed[name], "ratio": ratios, "ms": median}
            | {"tflops": tera * computed[name] / (median / 1000)}
            | {"sdpa_ms": {other: statistics.median(times[other]) for other in theirs}}
            | {"sdpa_tflops": {o: tera / (statistics.median(times[o]) / 1000) for o in theirs}}
        )
    return rows


def measure_companions(
    tokens: int, head_dim: int, heads: int, dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """Milliseconds of the smaller kernels, prebuilt, at half of the tiles live."""
    shape = (1, tokens, heads, head_dim)
    q, k = (
        torch.randn(shape, device="cuda", dtype=DTYPES[dtype]).transpose(1, 2) for _ in range(2)
    )
    backend = CudaBackend("int8")
    tq, tk = backend.tile_shape(head_dim).grid(tokens, tokens)
    score = -20 * torch.rand(1, heads, tq, tk, device="cuda")
    live = torch.rand(1, heads, tq, tk, device="cuda") < 0.5
    bits, pinned = pack(live), torch.zeros(tq, tk, dtype=torch.bool, device="cuda")

    def with_torch() -> TileLists:
        kept = policy.next_live(unpack(bits, tk), score, -10.0, pinned)
        return make_lists(unpack(pack(kept), tk), alternate=True)

    calls: dict[str, Call] = {"tile map, torch": with_torch}
    if (fused := backend.tile_map(q.device)) is not None:
        calls["tile map, own kernels"] = lambda: fused.make_lists(
            fused.next_live(bits, score, -10.0, pinned), tk, alternate=True
        )
    if backend.unsupported(q, k, k) is None:

        def quantise() -> None:
            call = kernel_call.prepare(q, k, k, 0.1, None, None, qk="int8")
            for launch in call.launches[:-1]:
                backend.launcher.launch(launch, q.device)

        kept, factor = backend.forward(q, k, k, 0.1), torch.ones(1, heads, device="cuda")

        def tail() -> None:
            pooled = pool(k, k, backend.tile_shape(head_dim).k)
            backend.add_skipped(kept, q, pooled, 0.1, bits, factor)

        calls |= {"quantise q and k": quantise, "means of skipped tiles": tail}
    case = {"tokens": tokens, "head_dim": head_dim, "dtype": dtype}
    times = milliseconds(calls, repeats)
    return [case | {"companion": n, "ms": statistics.median(t)} for n, t in times.items()]


def describe_card() -> dict[str, Any]:
    """What the numbers depend on."""
    card = torch.cuda.get_device_properties(0)
    return {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
    }


def show(row: dict[str, Any]) -> str:
    head = f"{row['backend']:12} {row['tokens']:>7} x {row['head_dim']:<4} {row['dtype']:9}"
    if "unsupported" in row:
        return f"{head} {row['unsupported']}"
    ratios = "  ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratio"].items())
    return f"{head} {row['skipped']:>6}  {ratios}  {row['ms']:8.2f} ms {row['tflops']:6.1f} TFLOPS"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 75600])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--backend", nargs="+", choices=OURS, default=["cuda"])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no graphics card: python -m benchmarks.speed measures on the CPU")
    cases = list(product(args.backend, args.tokens, args.head_dim, args.dtype))
    rows: list[dict[str, Any]] = []
    for name, tokens, head_dim, dtype in tqdm(cases, disable=None):
        found = measure(OURS[name](), tokens, head_dim, args.heads, dtype, args.repeats)
        rows += found
        for row in found:
            tqdm.write(show(row))
    companions: list[dict[str, Any]] = []
    for tokens, head_dim, dtype in product(args.tokens, args.head_dim, args.dtype):
        companions += measure_companions(tokens, head_dim, args.heads, dtype, args.repeats)
    for row in companions:
        head = f"{row['companion']:22} {row['tokens']:>7} x {row['head_dim']:<4} {row['dtype']:9}"
        print(f"{head} {row['ms']:8.2f} ms")
    if args.json:
        result = {"machine": describe_card(), "heads": args.heads, "rows": rows}
        result["companions"] = companions
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
