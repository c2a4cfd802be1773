"""Which order of the tokens makes the best tiles? ``python -m benchmarks.orders``.

First the shape of the tiles on the grids of real models: the root mean square distance of a token
from the middle of its tile of 64, in tokens. Then, on a grid where the orders differ, what each is
worth: the demo model with LiteAttention, its tokens listed in each order.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_video import DEVELOPMENT, DemoVideos, Moment
from benchmarks.record import write_json
from comfyui_liteattention.attention import LayerState, attend
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.cpu.backend import CpuBackend
from comfyui_liteattention.budget.ledger import MARGIN, allowance
from comfyui_liteattention.report.compare import compare
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.token_order import Grid, compact_order

TILE = 64
#: Token grids (frames, rows, columns) of common settings.
GRIDS: dict[str, Grid] = {
    "Wan 480p, 81 frames": (21, 30, 52),
    "Wan 720p, 81 frames": (21, 45, 80),
    "HunyuanVideo 720p, 129 frames": (33, 45, 80),
    "LTX-Video 768 x 512, 97 frames": (13, 16, 24),
}
#: The demo model where sides are no powers of two: on its usual 16 x 16 x 16, blocks of 4 x 4 x 4,
#: Hilbert and compact all give the same tiles.
ODD: dict[str, Any] = {"num_frames": 49, "height": 240, "width": 208}
ODD_GRID: Grid = (13, 15, 13)
BUDGETS = (0.03, 0.1)

Order = Callable[[Grid], np.ndarray]


def places(grid: Grid) -> np.ndarray:
    """Coordinates of all tokens in raster order, ``[N, 3]``."""
    return np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=1)


def raster(grid: Grid) -> np.ndarray:
    return np.arange(np.prod(grid))


def blocks(size: Grid, grid: Grid) -> np.ndarray:
    """Block by block, each in raster order. Blocks at the edges are smaller, so that the tiles
    after them are no longer whole blocks."""
    at = places(grid)
    inside, block = at % size, at // size
    return np.lexsort([*inside.T[::-1], *block.T[::-1]])


def hilbert(grid: Grid) -> np.ndarray:
    """Along a Hilbert curve through the smallest cube whose side is a power of two, without the
    points outside the grid (Skilling, "Programming the Hilbert curve", AIP Conf. Proc. 707, 2004).
    """
    bits = max(1, int(np.ceil(np.log2(max(grid)))))
    x = places(grid).T.copy()
    bit = 1 << (bits - 1)
    while bit > 1:
        low = bit - 1
        for axis in range(3):
            flip = (x[axis] & bit) != 0
            swap = np.where(flip, 0, (x[0] ^ x[axis]) & low)
            x[0] ^= np.where(flip, low, swap)
            x[axis] ^= swap
        bit >>= 1
    x[1] ^= x[0]
    x[2] ^= x[1]
    turn = np.zeros_like(x[0])
    bit = 1 << (bits - 1)
    while bit > 1:
        turn ^= np.where((x[2] & bit) != 0, bit - 1, 0)
        bit >>= 1
    x ^= turn
    along = np.zeros_like(x[0])
    for level in range(bits - 1, -1, -1):
        for axis in range(3):
            along = along << 1 | x[axis] >> level & 1
    return np.argsort(along, kind="stable")


def compact(grid: Grid) -> np.ndarray:
    return compact_order(places(grid), (TILE,))


ORDERS: dict[str, Order] = {
    "raster": raster,
    "blocks 4 x 4 x 4": partial(blocks, (4, 4, 4)),
    "blocks 1 x 8 x 8": partial(blocks, (1, 8, 8)),
    "Hilbert": hilbert,
    "compact": compact,
}


def radius(order: np.ndarray, grid: Grid) -> float:
    """Root mean square distance of the tokens from the middle of their tile."""
    listed = places(grid)[order].astype(float)
    tiles = [listed[at : at + TILE] for at in range(0, len(listed), TILE)]
    squares = np.concatenate([((tile - tile.mean(0)) ** 2).sum(1) for tile in tiles])
    return float(np.sqrt(squares.mean()))


class Ordered:
    """LiteAttention on tokens that are listed in ``order``."""

    def __init__(self, settings: Settings, order: np.ndarray, steps: int) -> None:
        self._settings = settings
        self._order = torch.from_numpy(order)
        self._place = self._order.argsort()
        self._steps = steps
        self._backend = CpuBackend()
        self._states: dict[Hashable, LayerState] = {}
        self._remaining: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        self.computed = self.total = 0

    def __call__(self, at: Moment, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (t.index_select(2, self._order) for t in (q, k, v))
        fresh = LayerState(name=at.layer, remaining=self._remaining[at.stream])
        state = self._states.setdefault((at.layer, at.stream), fresh)
        position = (at.step + 1) / self._steps
        assert self._settings.budget is not None
        aim = MARGIN * allowance(self._settings.budget, self._settings.ramp, position)
        out, tally = attend(
            state, self._backend, Inputs(q, k, v, scale), self._settings, position, aim=aim
        )
        self.computed += int(tally.computed)
        self.total += tally.total
        return out.index_select(2, self._place)


def measure(seeds: int) -> list[dict[str, Any]]:
    """Computed fraction and PSNR for each order, budget and seed."""
    videos = DemoVideos(**ODD)
    rows = []
    for case in DEVELOPMENT[:seeds]:
        dense = videos.dense(case).video
        for name, order in ORDERS.items():
            for budget in BUDGETS:
                ordered = Ordered(Settings(budget=budget), order(ODD_GRID), case.steps)
                video, _ = videos.through(ordered, case)
                row = {
                    "order": name,
                    "budget": budget,
                    "seed": case.seed,
                    "computed_fraction": round(ordered.computed / ordered.total, 4),
                    "psnr_db": round(compare(dense, video).psnr_all, 2),
                }
                print(row, flush=True)
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.orders", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    radii = {
        title: {name: round(radius(order(grid), grid), 2) for name, order in ORDERS.items()}
        for title, grid in GRIDS.items()
    }
    for title, found in radii.items():
        print(f"{title:<32}" + "  ".join(f"{name} {r:.2f}" for name, r in found.items()))
    rows = measure(options.seeds)
    for name in ORDERS:
        for budget in BUDGETS:
            some = [row for row in rows if (row["order"], row["budget"]) == (name, budget)]
            keys = ("computed_fraction", "psnr_db")
            computed, db = (sum(row[key] for row in some) / len(some) for key in keys)
            print(f"{name:<18} {budget:>6.1%} {computed:>7.1%} of the tiles {db:>6.1f} dB")
    if options.json:
        write_json(options.json, radius=radii, rows=rows)


if __name__ == "__main__":
    main()
