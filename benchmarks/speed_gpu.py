"""How fast the kernel is on a graphics card, against each SDPA backend of torch.

    python -m benchmarks.speed_gpu [--json FILE] [--tokens 32768 75600] [--head-dim 64 128]
                                   [--heads 12] [--backend cuda triton] [--repeats 20]

Three kinds of rows:

- "dense", "0%", "25%", ...: **the kernel alone**. "0%" reads a list that names every tile and
  writes the mass scores, as while sampling; "dense" does neither. "-int8" multiplies q and k in 8
  bits, and its times include what makes them so.
- "0% whole", ...: **what a user gets**, a call of a run with the default preset and a map in which
  so many tiles are skipped: putting k and v in order, lists, kernel, scores, audit, tail, the next
  map, the test for finite numbers. Not in it: a run waits for each of its calls, so that the card
  may then idle until the host has queued what comes next in the model.
- at the end, what goes with the kernel: quantising alone, the tile map (scores to a threshold that
  holds a budget, to bits, to lists) with torch and with its own kernels, the means of skipped tiles
  and their audit.

All times are the card's: it is busy with something else until the host has queued a call. A ratio
is our time / theirs, below 1 is faster, the median over pairs of calls that took turns. "of dense"
is our time / that of our dense kernel, beside the goal where a share s is skipped,
1.03 (1 - s) + 0.02. TFLOPS count the tiles of the map that are computed.
**Never run yet: no GPU was at hand.**
"""

from __future__ import annotations

import argparse
import json
import math
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

from comfyui_liteattention.backends import tile_map as torch_tile_map
from comfyui_liteattention.backends.base import Inputs, Skipped, TileMap
from comfyui_liteattention.backends.gpu import launches
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.jit import JitLauncher
from comfyui_liteattention.backends.gpu.prebuilt import process_launcher
from comfyui_liteattention.backends.pooled import pool
from comfyui_liteattention.budget.allocation import BINS
from comfyui_liteattention.presets import DEFAULT, preset
from comfyui_liteattention.run import Run
from comfyui_liteattention.schedule import Progress
from comfyui_liteattention.tiles import TileLists, make_lists, pack
from comfyui_liteattention.token_order import Grid, VideoTokens

DEVICE = torch.device("cuda")
#: Cycles, some 10 ms, in which the host queues what is timed.
HEAD_START = 20_000_000
SKIPPED = (0.0, 0.25, 0.5, 0.75, 0.9)
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS: dict[str, Callable[[], KernelBackend]] = {
    "cuda": lambda: KernelBackend(process_launcher()),
    "cuda-int8": lambda: KernelBackend(process_launcher(), "int8"),
    "triton": lambda: KernelBackend(JitLauncher()),
    "triton-int8": lambda: KernelBackend(JitLauncher(), "int8"),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: Layers that share a budget with the one whose map is timed, as in Wan 1.3B.
OTHER_LAYERS = 29
Call = Callable[[], object]


def milliseconds(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Each call ``repeats`` times, taking turns, after two untimed rounds: the card's time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START)
            start.record()
            call()
            end.record()
            end.synchronize()
            if repeat >= 2:
                times[name].append(start.elapsed_time(end))
    return times


def goal(computed: float) -> float:
    """Our time / that of our dense kernel, at most, where this share of the tiles is computed."""
    return 1.03 * computed + 0.02


def random_live(backend: KernelBackend, q: Tensor, skipped: float) -> tuple[Tensor, float]:
    """As many random tiles in every row, ``[B, H, Tq, Tk]`` bool; also the share that they are."""
    tq, tk = backend.tile_shape(q.shape[-1]).grid(q.shape[2], q.shape[2])
    live = max(1, round(tk * (1 - skipped)))
    order = torch.rand(*q.shape[:2], tq, tk, device=q.device).argsort(-1)
    return order < live, live / tk


def grid_of(tokens: int) -> Grid:
    """A video of so many tokens, as near to a cube as their number allows."""

    def divisor(number: int, at_most: int) -> int:
        return next(d for d in range(at_most, 0, -1) if number % d == 0)

    frames = divisor(tokens, round(tokens ** (1 / 3)))
    rows = divisor(tokens // frames, math.isqrt(tokens // frames))
    return frames, rows, tokens // frames // rows


def whole_call(backend: KernelBackend, q: Tensor, k: Tensor, v: Tensor, live: Tensor) -> Call:
    """A layer's call in the middle of a run with the default preset, always with this map."""
    run = Run(preset(DEFAULT), backend, range(10, -1, -1))
    video, bits = VideoTokens(grid_of(q.shape[2])), pack(live)

    def call() -> Tensor:
        for state in run._states.values():
            assert state.live is not None
            state.live.copy_(bits)  # else it would be what the last call made of it
        out = run.attend(
            "layer", ["positive"], Progress(4, 0.5), Inputs(q, k, v, q.shape[-1] ** -0.5), video
        )
        assert out is not None, f"the run went on densely: {run.report().reasons}"
        return out

    call()  # dense, as there is no map yet
    return call


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
    backend: KernelBackend, q: Tensor, k: Tensor, v: Tensor
) -> tuple[dict[str, Call], dict[str, float]]:
    """Dense, then the kernel and a whole call at each share skipped; and the share of the tiles
    that each computes."""
    call = Inputs(q, k, v, q.shape[-1] ** -0.5)
    calls: dict[str, Call] = {"dense": partial(backend.forward, call)}
    computed = {"dense": 1.0}
    for skipped in SKIPPED:
        live, share = random_live(backend, q, skipped)
        name = f"{skipped:.0%}"
        calls[name] = partial(backend.forward, call, make_lists(live), "mass")
        calls[f"{name} whole"] = whole_call(backend, q, k, v, live)
        computed |= {name: share, f"{name} whole": share}
    return calls, computed


def measure(
    backend: KernelBackend, tokens: int, head_dim: int, heads: int, dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """One row for dense, and two for each share skipped."""
    shape = (1, tokens, heads, head_dim)
    q, k, v = (
        torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype]).transpose(1, 2) for _ in range(3)
    )
    case = {"backend": backend.name, "tokens": tokens, "head_dim": head_dim, "dtype": dtype}
    if reason := backend.unsupported(q, k, v):
        return [case | {"unsupported": reason}]
    theirs = sdpa_calls(q, k, v)
    ours, computed = our_calls(backend, q, k, v)
    times = milliseconds(theirs | ours, repeats)
    # Two matrix products, two operations for each multiply-add.
    tera = 4 * heads * tokens**2 * head_dim * 1e-12

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    rows = []
    for name in ours:
        median = statistics.median(times[name])
        ratios = {other: ratio(name, other) for other in theirs}
        rows.append(
            case
            | {"call": name, "computed": computed[name], "ratio": ratios, "ms": median}
            | {"of_dense": ratio(name, "dense"), "goal": goal(computed[name])}
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
        torch.randn(shape, device=DEVICE, dtype=DTYPES[dtype]).transpose(1, 2) for _ in range(2)
    )
    backend = KernelBackend(process_launcher(), "int8")
    tq, tk = backend.tile_shape(head_dim).grid(tokens, tokens)
    score = -20 * torch.rand(1, heads, tq, tk, device=DEVICE)
    live = torch.rand(1, heads, tq, tk, device=DEVICE) < 0.5
    bits, pinned = pack(live), torch.zeros(tq, tk, dtype=torch.bool, device=DEVICE)

    ledger = torch.tensor([0.02, 0.01, 0.03, 2.0], dtype=torch.float64, device=DEVICE)
    others = [1e-4 * torch.ones(1 + BINS, dtype=torch.float64, device=DEVICE)] * OTHER_LAYERS

    def keep(tile_map: TileMap) -> TileLists:
        """Hold a budget: from the scores of a call to the lists of the next one."""
        counts = tile_map.histogram(bits, score, pinned)
        choice = tile_map.choose(counts, heads * tq, ledger, ledger[1], 0.3, others, 0.05)
        following = tile_map.next_live(bits, score, choice.limit, pinned)
        return tile_map.make_lists(following, tk, alternate=True)

    calls: dict[str, Call] = {"tile map, torch": lambda: keep(torch_tile_map)}
    if (kernels := backend.tile_map(q.device)) is not None:
        calls["tile map, own kernels"] = lambda: keep(kernels)
    if backend.unsupported(q, k, k) is None:

        def quantise() -> None:
            call = launches.prepare(Inputs(q, k, k, 0.1), None, None, qk="int8")
            for launch in call.launches[:-1]:
                backend.launcher.launch(launch, q.device)

        kept, factor = backend.forward(Inputs(q, k, k, 0.1)), torch.ones(1, heads, device=DEVICE)

        def tail() -> None:
            pooled = pool(k, k, backend.tile_shape(head_dim).k)
            backend.add_skipped(kept, Skipped(q, pooled, 0.1, bits), factor)

        audited = range(max(1, tq // preset(DEFAULT).audit))
        pooled = pool(k, k, backend.tile_shape(head_dim).k)
        full = backend.forward(
            Inputs(q[:, :, : len(audited) * backend.tile_shape(head_dim).q], k, k, 0.1)
        )

        def audit() -> None:
            backend.audit_skipped(kept, Skipped(q, pooled, 0.1, bits), full, audited)

        calls |= {
            "quantise q and k": quantise,
            "means of skipped tiles": tail,
            "audit of those means": audit,
        }
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
    times = f"{row['ms']:8.2f} ms {row['tflops']:6.1f} TFLOPS"
    line = f"{head} {row['call']:>9}  {ratios}  {times}"
    if row["call"] == "dense":
        return line
    return f"{line}  of dense {row['of_dense']:.3f}, goal {row['goal']:.3f}"


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
