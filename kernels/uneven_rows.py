"""What sorting the query tiles by the length of their lists would gain: longest first.

    python kernels/uneven_rows.py

Blocks are handed out in the order of the grid, one query tile each; the last ones leave
multiprocessors idle. This hands out the lists of one video of the demo model (two budgets, all
layers, heads and steps; scaled to the tiles and heads of real models) in three orders: as they
come, longest first within every head, longest first of all. Time is counted in key tiles. A few
minutes on one core. The table is in kernels/README.md.
"""

# ruff: noqa: E402 - sys.path must be set right before anything else is imported

import os
import sys

# Not this folder, whose inspect.py would hide the standard library's, but its parent.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import heapq
from statistics import mean
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.demo_video import DemoVideos
from benchmarks.quality import CASES
from comfyui_liteattention.backends.cpu import CpuBackend
from comfyui_liteattention.backends.cuda_variants import TILE
from comfyui_liteattention.settings import Settings

BUDGETS = (0.01, 0.1)
STEPS = 8
TOKENS = 4096
#: Tokens and heads of a call.
SHAPES = {
    "8k, 12 heads": (8192, 12),
    "33k, 12 heads (Wan 1.3B, 480p)": (32760, 12),
    "33k, 40 heads (Wan 14B, 480p)": (32760, 40),
    "76k, 40 heads (Wan 14B, 720p)": (75600, 40),
}
#: Blocks that run at once: 132 multiprocessors with one or two.
SLOTS = (132, 264)
#: A block's own work besides its key tiles: loading q, storing out.
OVERHEAD = 0.6


def record_lists() -> list[Tensor]:
    """Share of the tiles that is listed, ``[heads, query tiles]`` for every sparse call."""
    found = []
    forward = CpuBackend.forward

    def noting(self, q, k, v, scale, lists=None, criterion=None):
        if lists is not None and q.shape[2] == TOKENS:
            found.append(lists.count.flatten(0, 1) / lists.index.shape[-1])
        return forward(self, q, k, v, scale, lists, criterion)

    videos = DemoVideos()
    with mock.patch.object(CpuBackend, "forward", noting):
        for budget in BUDGETS:
            videos.lite(CASES[0]._replace(steps=STEPS), Settings(budget=budget))
    return found


def scale_up(shares: Tensor, tokens: int, heads: int, seed: int) -> Tensor:
    """``[heads, query tiles]`` of another shape: heads drawn at random, rows in between."""
    tq, tk = TILE.grid(tokens, tokens)
    rows = interpolate(shares.unsqueeze(0), size=tq, mode="linear")[0]
    drawn = torch.randint(len(rows), (heads,), generator=torch.Generator().manual_seed(seed))
    return (rows[drawn] * tk).round().clamp(1, tk) + OVERHEAD


def span(costs: Tensor, slots: int) -> float:
    """When the last block ends, if each goes to the first free slot."""
    busy = [0.0] * slots
    for cost in costs.flatten().tolist():
        heapq.heapreplace(busy, busy[0] + cost)
    return max(busy)


def main() -> None:
    recorded = record_lists()
    print(f"{len(recorded)} calls")
    for name, (tokens, heads) in SHAPES.items():
        for slots in SLOTS:
            gains = []
            for seed, shares in enumerate(recorded[::4]):
                costs = scale_up(shares, tokens, heads, seed)
                orders = (costs.sort(-1, descending=True)[0], costs.flatten().sort()[0].flip(0))
                before = span(costs, slots)
                gains.append([1 - span(order, slots) / before for order in orders])
            within, of_all = (mean(g) for g in zip(*gains, strict=True))
            print(f"{name}, {slots} blocks: within heads {within:.1%}, of all {of_all:.1%}")


if __name__ == "__main__":
    main()
