"""Float64 twin of the kernel's own score: against the running maximum and sum, in list order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Criterion
from comfyui_liteattention.tiles import TileLists, TileShape

LOG2E = math.log2(math.e)


def running_scores(
    q: Tensor, k: Tensor, scale: float, lists: TileLists, tile: TileShape, criterion: Criterion
) -> Tensor:
    """``[B, H, Tq, Tk]`` float64, log2; ``gpu/kernels/attend.py``'s formulas, tile by tile."""
    b, h, lq, _ = q.shape
    lk = k.shape[2]
    s = q.double() @ k.double().mT * (scale * LOG2E)
    score = torch.full((b, h, *tile.grid(lq, lk)), -math.inf, dtype=torch.float64)
    for place in torch.cartesian_prod(*map(torch.arange, lists.count.shape)).tolist():
        i, j, query_tile = place
        rows = s[i, j, query_tile * tile.q : (query_tile + 1) * tile.q]
        top = torch.full((len(rows),), -math.inf, dtype=torch.float64)
        total = top.clone()  # log2 of the running sum
        for t in lists.index[i, j, query_tile, : lists.count[i, j, query_tile]].tolist():
            block = rows[:, t * tile.k : (t + 1) * tile.k]
            weight = torch.logsumexp(block * math.log(2), 1) * LOG2E
            top = torch.maximum(top, block.amax(1))
            total = torch.logaddexp2(total, weight)
            share = weight - total if criterion == "mass" else block.amax(1) - top
            score[i, j, query_tile, t] = share.amax()
    return score
