"""One launch of one kernel: data, whoever launches it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

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


def card_number(device: torch.device) -> int:
    """The number of a card; ``cuda`` without one is the current card."""
    return device.index if device.index is not None else torch.cuda.current_device()
