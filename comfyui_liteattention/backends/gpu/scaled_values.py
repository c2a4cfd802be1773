"""Values in fp16 or e4m3: the twin of ``kernels/values.py`` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernel_table import LARGEST_E4M3, TOP, Values

DTYPES: dict[Values, torch.dtype] = {"fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
#: Lower bound of what is called the largest magnitude: it and its inverse are float32 numbers.
SMALLEST = 1e-36
#: As in kernels/values.py.
ERROR_STEPS = 2.0**20


class Scaled(NamedTuple):
    """``values``: ``[B, H, Lk, D]`` float16, or ``[B, H, D, L]`` e4m3 with L the next multiple of a
    key tile and zeros behind Lk; ``unit [B, H, D]`` float32: what v was divided by."""

    values: Tensor
    unit: Tensor


def scale_values(v: Tensor, values: Values, rows: int) -> Scaled:
    """``v [B, H, Lk, D]``, ``rows`` of a key tile: see kernels/values.py."""
    x = v.float()
    peak = x.abs().amax(2)
    if values == "e4m3":
        peak = peak.clamp(min=SMALLEST)
        scaled = x * (torch.full_like(peak, LARGEST_E4M3) / peak).unsqueeze(2)
        padded = torch.nn.functional.pad(scaled, (0, 0, 0, -x.shape[2] % rows))
        inside = torch.arange(padded.shape[2], device=v.device) < x.shape[2]
        tiles = balanced(padded.unflatten(2, (-1, rows)), inside.unflatten(0, (-1, rows)))
        return Scaled(
            tiles.flatten(2, 3).mT.contiguous().to(DTYPES[values]), peak * (1 / LARGEST_E4M3)
        )
    exponent = torch.frexp(peak).exponent - TOP  # peak < 2^(exponent + TOP)
    exponent = torch.where(peak > 0, exponent, -126).clamp(-126, 126)
    unit = torch.ldexp(torch.ones_like(peak), exponent)
    return Scaled((x / unit.unsqueeze(2)).to(DTYPES[values]), unit)


def balanced(x: Tensor, inside: Tensor) -> Tensor:
    """``x [B, H, Tk, rows, D]`` rounded to e4m3 such that errors cancel over a tile's rows, as far
    as they are ``inside [Tk, rows]``: see kernels/values.py."""
    nearest = _to_e4m3(x)
    off = _summed_error(nearest, x)
    shifted = x - off * (1 / ERROR_STEPS / x.shape[3])
    shifted = shifted.clamp(-LARGEST_E4M3, LARGEST_E4M3)
    shifted = _to_e4m3(torch.where(inside.unsqueeze(-1), shifted, 0))
    return torch.where(_summed_error(shifted, x).abs() < off.abs(), shifted, nearest)


def _to_e4m3(x: Tensor) -> Tensor:
    return x.to(DTYPES["e4m3"]).float()


def _summed_error(rounded: Tensor, exact: Tensor) -> Tensor:
    return ((rounded - exact) * ERROR_STEPS + 0.5).floor().sum(-2, keepdim=True)


def restored(scaled: Scaled, length: int) -> Tensor:
    """``[B, H, length, D]`` float32: v as the kernel sees it, without its rounding sums."""
    values = scaled.values.float()
    if scaled.values.dtype == DTYPES["e4m3"]:
        values = values.mT[:, :, :length]
    return values * scaled.unit.unsqueeze(2)
