"""The twin of ``kernels/quantise.py`` in plain PyTorch, and the truth of the INT8 mode."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...tiles import TileLists
from ..base import Attended, Criterion, Inputs
from ..reference import LOG2E, ReferenceBackend

LARGEST = 127
#: Lower bound of what is called the largest magnitude: units must not be 0.
SMALLEST = 1e-12


class Queries(NamedTuple):
    """``values [B, H, Lq, D]`` int8; ``unit [B, H, Lq]`` float32, log2 and scale included;
    ``shift [B, H, Lq]`` float32, natural log: what the keys' mean adds to the LSE."""

    values: Tensor
    unit: Tensor
    shift: Tensor


class Keys(NamedTuple):
    """``values [B, H, Lk, D]`` int8; ``unit [B, H, Tk]`` float32."""

    values: Tensor
    unit: Tensor


def mean_key(k: Tensor) -> Tensor:
    """``k [B, H, Lk, D]`` -> the mean over its tokens ``[B, H, D]`` float32, contiguous."""
    return k.mean(2, dtype=torch.float32).contiguous()


def quantise_queries(q: Tensor, mean: Tensor, scale: float) -> Queries:
    """``q [B, H, Lq, D]``, ``mean [B, H, D]``: see kernels/quantise.py."""
    x = q.float()
    largest = x.abs().amax(-1).clamp(min=SMALLEST)
    shift = (x * mean.unsqueeze(2)).sum(-1) * scale
    return Queries(_round(x, largest), largest * (scale * LOG2E / LARGEST), shift)


def quantise_keys(k: Tensor, mean: Tensor, rows: int) -> Keys:
    """``k [B, H, Lk, D]``, ``mean [B, H, D]``, ``rows`` of a key tile: see kernels/quantise.py."""
    x = k.float() - mean.unsqueeze(2)
    tiles = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % rows)).unflatten(2, (-1, rows))
    largest = tiles.abs().amax((-1, -2)).clamp(min=SMALLEST)  # [B, H, Tk]
    per_token = largest.repeat_interleave(rows, -1)[..., : x.shape[2]]
    return Keys(_round(x, per_token), largest / LARGEST)


def _round(x: Tensor, largest: Tensor) -> Tensor:
    steps = torch.full_like(largest, LARGEST) / largest  # a number / tensor rounds twice
    return (x * steps.unsqueeze(-1) + 0.5).floor().to(torch.int8)


class Int8Reference(ReferenceBackend):
    """Plain attention of the quantised queries and keys: what the INT8 kernels approximate."""

    name = "reference, int8"

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        mean = mean_key(call.k)
        queries = quantise_queries(call.q, mean, call.scale)
        keys = quantise_keys(call.k, mean, self.tile.k)
        key_unit = keys.unit.repeat_interleave(self.tile.k, -1)[..., : call.k.shape[2]]
        rounded = call._replace(
            q=queries.values.to(self.dtype) * queries.unit.unsqueeze(-1).to(self.dtype),  # log2
            k=keys.values.to(self.dtype) * key_unit.unsqueeze(-1).to(self.dtype),
            scale=math.log(2),
        )
        result = super().forward(rounded, lists, criterion)
        return result._replace(out=result.out.to(call.q.dtype), lse=result.lse + queries.shift)
