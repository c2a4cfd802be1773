"""What kernels accept, as data: checked before every call, and described by ``doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INT32 = 2**31


@dataclass(frozen=True)
class Constraints:
    """The tensors that a kernel accepts.

    ``device``: torch's device type. ``alignment``, in bytes: compiled code relies on addresses
    being multiples of it. ``stride``, in elements: likewise for all strides but the last (1: any
    layout). ``most_heads``: limit of batch times heads. ``rows``: how many rows a 32-bit offset
    from a tile's first row has to reach, or None where offsets are wider.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    head_dims: Sequence[int]
    alignment: int = 1
    stride: int = 1
    most_heads: int | None = None
    rows: int | None = None

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why ``q [B, H, Lq, D]``, ``k, v [B, H, Lk, D]`` can't be accepted, or None."""
        if q.dtype not in self.dtypes:
            return f"dtype {short(q.dtype)} (the kernel takes {_listed(self.dtypes)})"
        if k.dtype != q.dtype or v.dtype != q.dtype:
            return f"mixed dtypes {short(q.dtype)}, {short(k.dtype)}, {short(v.dtype)}"
        if not q.dim() == k.dim() == v.dim() == 4:
            return (
                f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} aren't [B, H, L, D]"
            )
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "training (gradients are needed)"
        b, h, lq, d = q.shape
        if d not in self.head_dims:
            return f"head_dim {d} (the kernel takes {_spelled(self.head_dims)})"
        if k.shape != v.shape or k.shape != (b, h, k.shape[2], d):
            return f"shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} don't match"
        if lq < 1 or k.shape[2] < 1 or b * h < 1:
            return "empty tensors"
        if self.most_heads is not None and b * h > self.most_heads:
            return f"batch times heads is {b * h}, more than {self.most_heads}"
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.device.type != self.device or tensor.device != q.device:
                return f"{name} is on {tensor.device}, the kernel is for {self.device}"
            reason = self._layout_problem(tensor) if self.stride > 1 else None
            if reason is not None:
                return f"{name} {reason}"
        return None

    def describe(self) -> str:
        """One line for people."""
        return f"{_listed(self.dtypes)}; head_dim {_spelled(self.head_dims)}"

    def _layout_problem(self, x: Tensor) -> str | None:
        """How this tensor's memory layout differs from what compiled code relies on, or None."""
        if x.stride(-1) != 1:
            return "isn't contiguous along head_dim"
        for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True):
            # The stride of a dimension of size 1 is never used.
            if size > 1 and stride % self.stride:
                return f"has strides {x.stride()}, not multiples of {self.stride}"
        if self.rows is not None and x.stride(2) * self.rows >= _INT32:
            return f"has rows {x.stride(2)} elements apart, too far for the kernel"
        if x.data_ptr() % self.alignment:
            return f"doesn't start at a multiple of {self.alignment} bytes"
        return None


def short(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    *others, last = (short(dtype) for dtype in dtypes)
    return f"{', '.join(others)} and {last}" if others else last


def _spelled(head_dims: Sequence[int]) -> str:
    if isinstance(head_dims, range):
        return f"multiples of {head_dims.step} from {head_dims.start} to {head_dims[-1]}"
    return ", ".join(map(str, head_dims))
