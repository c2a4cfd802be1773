"""Speed of one attention call: our backend against SDPA at given shares of skipped tiles.

    python -m benchmarks.speed [--json FILE] [--tokens 4096 8192] [--head-dim 64 128] [--quick]

On the CPU only. A row's ratio is our time divided by SDPA's, below 1 is faster; its GFLOPS count
only the tiles that were computed. Our calls also return the tile scores, as they do when sampling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from benchmarks.record import describe_machine
from benchmarks.timing import Paired, Spread, time_pairs
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.cpu.backend import CpuBackend
from comfyui_liteattention.tiles import make_lists

SKIPPED = (0.0, 0.25, 0.5, 0.75, 0.9)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One row of the table before it is measured."""

    tokens: int
    head_dim: int
    dtype: str
    pattern: str  # "random" tiles or a "band" around the diagonal
    skipped: float


@dataclass(frozen=True)
class Row:
    """One measured row."""

    case: Case
    computed: float  # share of the tiles, after rounding to whole tiles
    sdpa_ms: Spread
    ours_ms: Spread
    ratio: Spread
    sdpa_gflops: float
    ours_gflops: float


def random_mask(heads: int, tq: int, tk: int, skipped: float) -> Tensor:
    """``[1, H, Tq, Tk]`` bool: the same number of live tiles in every row, anywhere."""
    live = max(1, round(tk * (1 - skipped)))
    order = torch.rand(1, heads, tq, tk).argsort(-1)
    return order < live


def band_mask(heads: int, tq: int, tk: int, skipped: float) -> Tensor:
    """``[1, H, Tq, Tk]`` bool: one run of live tiles around the diagonal of every row."""
    live = max(1, round(tk * (1 - skipped)))
    first = (torch.arange(tq) * tk // tq - live // 2).clamp(0, tk - live).unsqueeze(-1)
    tile = torch.arange(tk)
    return ((tile >= first) & (tile < first + live)).expand(1, heads, tq, tk)


def list_cases(tokens: Sequence[int], head_dims: Sequence[int]) -> list[Case]:
    """All rows of the CPU table; the band once per shape, at 75 % skipped."""
    cases = []
    for n, d, dtype in product(tokens, head_dims, DTYPES):
        cases += [Case(n, d, dtype, "random", skipped) for skipped in SKIPPED]
        cases.append(Case(n, d, dtype, "band", 0.75))
    return cases


def measure_on_cpu(case: Case, heads: int, repeats: int) -> Row:
    """Our CPU backend against SDPA, in pairs."""
    backend = CpuBackend()
    tile = backend.tile_shape(case.head_dim)
    shape = (1, case.tokens, heads, case.head_dim)  # transposed below, as models hand it over
    q, k, v = (torch.randn(shape).to(DTYPES[case.dtype]).transpose(1, 2) for _ in range(3))
    if reason := backend.unsupported(q, k, v):
        raise SystemExit(f"The CPU backend can't run here: {reason}")
    grid = tile.grid(case.tokens, case.tokens)
    mask = (band_mask if case.pattern == "band" else random_mask)(heads, *grid, case.skipped)
    lists = make_lists(mask)
    scale = case.head_dim**-0.5
    pair = time_pairs(
        lambda: scaled_dot_product_attention(q, k, v),
        lambda: backend.forward(Inputs(q, k, v, scale), lists, "mass"),
        repeats,
    )
    flops = 4.0 * heads * case.tokens**2 * case.head_dim
    return _make_row(case, mask.float().mean().item(), pair, flops)


def _make_row(case: Case, computed: float, pair: Paired, flops: float) -> Row:
    return Row(
        case=case,
        computed=computed,
        sdpa_ms=Spread(*(1e3 * s for s in pair.baseline)),
        ours_ms=Spread(*(1e3 * s for s in pair.ours)),
        ratio=pair.ratio,
        sdpa_gflops=flops / pair.baseline.median / 1e9,
        ours_gflops=flops * computed / pair.ours.median / 1e9,
    )


HEADER = (
    f"{'tokens':>6} {'dim':>4} {'dtype':>8} {'tiles':>6} {'skipped':>7} | {'SDPA ms':>8} "
    f"{'ours ms':>8} | {'ours/SDPA':>9} {'(min - max)':>13} | {'SDPA':>6} {'ours':>6} GFLOPS"
)


def format_row(row: Row) -> str:
    case, ratio = row.case, row.ratio
    return (
        f"{case.tokens:6} {case.head_dim:4} {case.dtype:>8} {case.pattern:>6} "
        f"{1 - row.computed:7.0%} | {row.sdpa_ms.median:8.1f} {row.ours_ms.median:8.1f} | "
        f"{ratio.median:9.2f} {f'({ratio.min:.2f} - {ratio.max:.2f})':>13} | "
        f"{row.sdpa_gflops:6.0f} {row.ours_gflops:6.0f}"
    )


def to_json(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """Machine and rows; spreads as ``{median, min, max}``."""
    flat = []
    for row in rows:
        spreads = {n: getattr(row, n)._asdict() for n in ("sdpa_ms", "ours_ms", "ratio")}
        flat.append(asdict(row.case) | asdict(row) | spreads)
        del flat[-1]["case"]
    return json.dumps({"machine": machine, "cpu": flat}, indent=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows here")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7, help="pairs per row")
    parser.add_argument("--quick", action="store_true", help="2048 tokens, 3 pairs: a minute less")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.repeats = [2048], min(options.repeats, 3)

    torch.manual_seed(0)
    machine = describe_machine()
    cases = list_cases(options.tokens, options.head_dim)
    rows = [measure_on_cpu(c, options.heads, options.repeats) for c in tqdm(cases, desc="CPU")]
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"batch 1, {options.heads} heads, medians of {options.repeats} interleaved pairs\n")
    print("\n".join([HEADER, *map(format_row, rows)]))
    if options.json:
        options.json.write_text(to_json(machine, rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
