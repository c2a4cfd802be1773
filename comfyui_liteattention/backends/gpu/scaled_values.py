"""Values in fp16 or e4m3: the twin of ``kernels/values.py`` in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernel_table import LARGEST_E4M3, TOP, Values

DTYPES: dict[Values, torch.dtype] = {"fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
#: Lower bound of what is called the largest magnitude: units must not be 0.
SMALLEST = 1e-12


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
        return Scaled(padded.mT.contiguous().to(DTYPES[values]), peak * (1 / LARGEST_E4M3))
    exponent = torch.frexp(peak).exponent - TOP  # peak < 2^(exponent + TOP)
    exponent = torch.where(peak > 0, exponent, -126).clamp(-126, 126)
    unit = torch.ldexp(torch.ones_like(peak), exponent)
    return Scaled((x / unit.unsqueeze(2)).to(DTYPES[values]), unit)


def restored(scaled: Scaled, length: int) -> Tensor:
    """``[B, H, length, D]`` float32: v as the kernel sees it, without its rounding sums."""
    values = scaled.values.float()
    if scaled.values.dtype == DTYPES["e4m3"]:
        values = values.mT[:, :, :length]
    return values * scaled.unit.unsqueeze(2)
