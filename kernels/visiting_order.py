"""How much the running sum misses, by visiting order, on synthetic attention scores.

    python kernels/visiting_order.py

The kernel scores a tile against the softmax sum of the tiles visited so far. This counts, for
several orders, the share of the truly negligible tiles that are then called negligible; and for the
previous call's LSE in place of the running sum, off by normal noise of 0.25 to 1 log2 a row. About
a minute on one core. The table is in kernels/README.md.
"""

# ruff: noqa: E402 - sys.path must be set right before anything else is imported

import os
import sys

# Not this folder, whose inspect.py would hide the standard library's, but its parent.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from comfyui_liteattention.backends.gpu.kernel_table import TILE

GRID = (8, 16, 32)  # frames, rows, columns
N = math.prod(GRID)
TQ, TK = TILE.grid(N, N)
THRESHOLD = -2 - math.log2(TK)
LN2 = math.log(2)
#: Fall of the score per step in time, row and column; weight of the content; bonus of a sink.
KINDS = {
    "local": ((1.0, 0.6, 0.5), 1, 0),
    "along time": ((0.1, 0.9, 0.9), 1, 0),
    "content": ((0, 0, 0), 3, 0),
    "sink": ((0, 0, 0), 2, 3),
}


def draw_scores(kind: str, temperature: float) -> Tensor:
    """``[N, N]``, log2."""
    fall, content, sink = KINDS[kind]
    axes = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    places = torch.stack(axes, -1).view(N, 3).float()
    s = -((places[:, None] - places[None]).abs() * torch.tensor(fall)).sum(-1)
    q, k = (
        interpolate(torch.randn(1, 64, 4, 4, 8), size=GRID, mode="trilinear").view(64, N).T
        for _ in range(2)
    )
    s += content * (q @ k.T) / 8
    s[:, :64] += sink
    return temperature * s / LN2


def log2_sums(x: Tensor) -> Tensor:
    return torch.logsumexp(x * LN2, -1) / LN2


def running_scores(weights: Tensor, order: Tensor, live: Tensor) -> Tensor:
    """Mass scores ``[TQ, TK]`` of the live tiles visited in ``order [TQ, TK]``.

    ``weights [TQ, BM, TK]``: log2 of each row's sum in each tile.
    """
    visited = weights.masked_fill(~live.unsqueeze(1), -math.inf)
    places = order.unsqueeze(1).expand_as(weights)
    in_order = visited.gather(-1, places)
    share = in_order - torch.logcumsumexp(in_order * LN2, -1) / LN2
    score = share.masked_fill(in_order == -math.inf, -math.inf).amax(1)
    return torch.full((TQ, TK), -math.inf).scatter(-1, order, score)


def found(weights: Tensor) -> dict[str, float]:
    """Order -> share of the negligible tiles that it finds; of the others too, where it does."""
    negligible = (weights - log2_sums(weights).unsqueeze(-1)).amax(1) <= THRESHOLD
    everything = torch.ones_like(negligible)
    tiles = torch.arange(TK).expand(TQ, TK)
    distance = (tiles - torch.arange(TQ).unsqueeze(1) * TILE.q // TILE.k).abs()
    diagonal = (distance > TILE.q // TILE.k - 1).to(torch.uint8)

    def score(order: Tensor, live: Tensor = everything) -> Tensor:
        return running_scores(weights, order, live)

    ascending = score(tiles)
    again = score(tiles.flip(-1), ascending > THRESHOLD)
    first = score(diagonal.argsort(dim=-1, stable=True))
    scores = {
        "ascending": ascending,
        "diagonal first": first,
        "by distance": score(distance.argsort(dim=-1, stable=True)),
        "there and back": torch.minimum(ascending, again),
        "strongest first": score(first.argsort(-1, descending=True)),
    }
    for drift in (0.25, 0.5, 1.0):
        known = log2_sums(weights) + drift * torch.randn(TQ, TILE.q)
        sums = torch.maximum(torch.logcumsumexp(weights * LN2, -1) / LN2, known.unsqueeze(-1))
        scores[f"LSE off by {drift}"] = (weights - sums).amax(1)
    total, others = max(int(negligible.sum()), 1), int((~negligible).sum())
    result = {"negligible": negligible.float().mean().item()}
    for name, called in ((name, x <= THRESHOLD) for name, x in scores.items()):
        result[name] = (called & negligible).sum().item() / total
        if wrong := (called & ~negligible).sum().item():
            result[f"({name}, wrongly)"] = wrong / others
    return result


def main() -> None:
    torch.manual_seed(0)
    for kind in KINDS:
        for temperature in (0.5, 1.0, 2.0):
            s = draw_scores(kind, temperature)
            weights = log2_sums(s.view(TQ, TILE.q, TK, TILE.k))
            shares = "  ".join(f"{n} {x:.3f}" for n, x in found(weights).items())
            print(f"{kind:10} x {temperature}: {shares}", flush=True)


if __name__ == "__main__":
    main()
