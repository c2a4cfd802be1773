"""The truth of the faster modes: plain attention of what they round q, k and v to.

What 8 bits round away is the mode's, not a fault of a kernel. Rounding of p and of sums is left to
the kernels, whose results depend there on the order of tiles.
"""

from __future__ import annotations

import math

import torch

from ...tiles import TileLists, TileShape
from ..base import Attended, Criterion, Inputs
from ..reference import ReferenceBackend
from . import qk_int8, scaled_values
from .kernel_table import Method


class LowPrecisionReference(ReferenceBackend):
    """See :class:`~..reference.ReferenceBackend`."""

    def __init__(
        self,
        method: Method,
        tile: TileShape = TileShape(64, 64),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__(tile, dtype)
        self.method = method
        self.name = f"reference, {method.name}"

    def forward(
        self, call: Inputs, lists: TileLists | None = None, criterion: Criterion | None = None
    ) -> Attended:
        q, k, v, scale = call[:4]
        if self.method.values != "own":
            scaled = scaled_values.scale_values(v, self.method.values, self.tile.k)
            call = call._replace(v=scaled_values.restored(scaled, v.shape[2]))
        if not self.method.int8:
            return super().forward(call, lists, criterion)
        mean = qk_int8.mean_key(k)
        queries = qk_int8.quantise_queries(q, mean, scale)
        keys = qk_int8.quantise_keys(k, mean, self.tile.k)
        key_unit = keys.unit[..., : k.shape[2]]
        rounded = call._replace(
            q=queries.values.to(self.dtype) * queries.unit.unsqueeze(-1).to(self.dtype),  # log2
            k=keys.values.to(self.dtype) * key_unit.unsqueeze(-1).to(self.dtype),
            scale=math.log(2),
        )
        result = super().forward(rounded, lists, criterion)
        return result._replace(out=result.out.to(q.dtype), lse=result.lse + queries.shift)
