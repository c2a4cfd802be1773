"""One launch of one kernel: data, whoever launches it."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..base import check_order
from .kernel_table import Kernel

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
Argument: TypeAlias = Tensor | int | float | None


class Launch(NamedTuple):
    """Which kernel, over which grid, with which arguments (in the order of its parameters).

    Pointers are tensors, or None where this variant doesn't look.
    """

    kernel: Kernel
    grid: tuple[int, int]
    arguments: tuple[Argument, ...]


def order_arguments(order: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
    """What a kernel is told about an order of the tokens of ``x [B, H, L, D]``: which, and how much
    of it there is to look at."""
    length = x.shape[2]
    if order is None:
        return _nothing(x.device), 0
    check_order(order, length)
    return order.contiguous(), length


@lru_cache(maxsize=8)
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)


def capability(device: torch.device) -> int:
    """The compute capability of an NVIDIA card, major * 10 + minor."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def card_number(device: torch.device) -> int:
    """The number of a card; ``cuda`` without one is the current card."""
    return device.index if device.index is not None else torch.cuda.current_device()
