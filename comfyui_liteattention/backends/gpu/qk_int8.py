"""Queries and keys in 8 bits: the twin of ``kernels/quantise.py`` in plain PyTorch."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import LOG2E

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
    """``values [B, H, Lk, D]`` int8; ``unit [B, H, L]`` float32, L the next multiple of a key
    tile."""

    values: Tensor
    unit: Tensor


@lru_cache(maxsize=8)
def hadamard(size: int, device: torch.device) -> Tensor:
    """``[size, size]`` float32, orthogonal and symmetric, all of one magnitude; a power of two."""
    matrix = torch.ones(1, 1, device=device)
    for _ in range(size.bit_length() - 1):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def rotated(x: Tensor) -> Tensor:
    """``x [..., D]`` -> float32, contiguous."""
    return (x.float() @ hadamard(x.shape[-1], x.device)).contiguous()


def mean_key(k: Tensor) -> Tensor:
    """``k [B, H, Lk, D]`` -> the mean over its tokens, rotated: ``[B, H, D]`` float32."""
    return rotated(k.mean(2, dtype=torch.float32))


def quantise_queries(q: Tensor, mean: Tensor, scale: float) -> Queries:
    """``q [B, H, Lq, D]``, ``mean [B, H, D]``: see kernels/quantise.py."""
    x = rotated(q)
    largest = x.abs().amax(-1).clamp(min=SMALLEST)
    shift = (x * mean.unsqueeze(2)).sum(-1) * scale
    return Queries(_round(x, largest), largest * (scale * LOG2E / LARGEST), shift)


def quantise_keys(k: Tensor, mean: Tensor, rows: int) -> Keys:
    """``k [B, H, Lk, D]``, ``mean [B, H, D]``, ``rows`` of a key tile: see kernels/quantise.py."""
    x = rotated(k) - mean.unsqueeze(2)
    largest = x.abs().amax(-1).clamp(min=SMALLEST)
    padding = (0, -x.shape[2] % rows)
    unit = torch.nn.functional.pad(largest, padding, value=SMALLEST) * (1 / LARGEST)
    return Keys(_round(x, largest), (unit.view(torch.int32) & -4).view(torch.float32))


def _round(x: Tensor, largest: Tensor) -> Tensor:
    steps = torch.full_like(largest, LARGEST) / largest  # a number / tensor rounds twice
    return (x * steps.unsqueeze(-1) + 0.5).floor().to(torch.int8)
