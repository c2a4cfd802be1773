"""Queries, keys and values in the layouts that models use, and masks of live tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.gpu.kernel_table import TILE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = (
    *("heads first", "tokens first", "fused", "padded rows"),
    *("part of a sequence", "expanded", "heads of tokens, batch inside"),
)


def tokens(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """``shape``: B, H, L, D."""
    b, h, length, d = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random).to(dtype)

    if layout == "heads first":
        return normal(b, h, length, d)
    if layout == "tokens first":
        return normal(b, length, h, d).transpose(1, 2)
    if layout == "fused":  # one of q, k, v of a projection; which one depends on the seed
        return normal(b, length, 3, h, d)[:, :, seed % 3].transpose(1, 2)
    if layout == "padded rows":
        return normal(b, h, length, d + 24)[..., 8 : d + 8]
    if layout == "part of a sequence":
        return normal(b, h, length + 9, d)[:, :, 5 : length + 5]
    if layout == "expanded":
        return normal(1, 1, length, d).expand(b, h, length, d)
    return normal(length, b, h, d).permute(1, 2, 0, 3)


def problem(
    heads: tuple[int, int],
    lengths: tuple[int, int],
    d: int,
    dtype: torch.dtype,
    layout: str = "tokens first",
    seed: int = 0,
) -> Inputs:
    """A call: ``heads`` B and H, ``lengths`` Lq and Lk; keys have much in common, as in models."""
    lq, lk = lengths
    q, k, v = (
        tokens((*heads, n, d), dtype, layout, 3 * seed + s) for s, n in enumerate((lq, lk, lk))
    )
    if layout in ("heads first", "tokens first"):
        k = k + tokens((*heads, 1, d), dtype, layout, 99)
    return Inputs(q, k, v, d**-0.5)


def with_sink(call: Inputs) -> Inputs:
    """Queries that all look at the first key: no other tile holds the maximum of any row, so that a
    tile's score is that of one row."""
    k = call.k.clone()
    k[:, :, 0] = 1
    return call._replace(q=call.q + 2, k=k)


def random_mask(call: Inputs, share: float, seed: int = 0) -> Tensor:
    """``[B, H, Tq, Tk]`` bool: so many of the tiles are live."""
    random = torch.Generator().manual_seed(seed)
    shape = (*call.q.shape[:2], *TILE.grid(call.q.shape[2], call.k.shape[2]))
    return torch.rand(shape, generator=random) < share


def shuffled(length: int, seed: int = 5) -> Tensor:
    """An order of the queries."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def moved(x: Tensor, by: int) -> Tensor:
    """A copy that starts ``by`` elements behind a place that is aligned."""
    memory = torch.empty(x.numel() + by, dtype=x.dtype)
    memory[by:] = x.flatten()
    return memory[by:].view(x.shape)
