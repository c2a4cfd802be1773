"""Run the kernel in the Triton interpreter, on CPU tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton
from triton.runtime import interpreter

from comfyui_liteattention.backends.base import Qk
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.jit import source
from comfyui_liteattention.backends.gpu.kernel_table import TILE
from comfyui_liteattention.backends.gpu.kernels.attend import attend_tiles
from comfyui_liteattention.backends.gpu.launches import CONSTRAINTS, Launch

#: The version whose interpreter the bfloat16 corrections below were written for.
TESTED_TRITON = "3.9.0"


class Interpreter:
    """Launches kernels in the Triton interpreter."""

    name = "interpreter"
    tile = TILE

    def missing(self, device: torch.device, qk: Qk) -> None:
        return None

    def launch(self, launch: Launch, device: torch.device) -> None:
        interpret(launch)


class InterpreterBackend(KernelBackend):
    """A backend like the real ones, for tests."""

    running_scores = False  # scores are checked against the final ones

    def __init__(self, qk: Qk = "native") -> None:
        super().__init__(Interpreter(), qk)

    def unsupported(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
        return replace(CONSTRAINTS, device="cpu").check(q, k, v)

    def provide(self, device, head_dim, dtype):
        return self

    def forward(self, call, lists=None, criterion=None):
        assert (reason := self.unsupported(*call[:3])) is None, reason
        return super().forward(call, lists, criterion)

    def tile_map(self, device: torch.device) -> None:
        return None


def interpret(launch: Launch) -> None:
    # The interpreter wants a tensor for every pointer, looked at or not.
    arguments = [torch.empty(0) if a is None else a for a in launch.arguments]
    source(launch.kernel.entry)[launch.grid](*arguments, **launch.kernel.constants())


def why_not() -> str | None:
    """Why the interpreter can't be used in this process, or None."""
    if not isinstance(attend_tiles, interpreter.InterpretedFunction):
        return "triton compiles in this process (a card is present, or it was imported too early)"
    if triton.__version__ != TESTED_TRITON:
        return (
            f"written for the interpreter of triton {TESTED_TRITON}, this is {triton.__version__}"
        )
    return None


def _multiply(self, a, b, accumulator, *_):
    """``tl.dot`` of the interpreter; the original multiplies the bit patterns of bfloat16, and
    8-bit integers as such."""
    a, b = (_widen(x) for x in (a, b))
    product = np.matmul(a, b, dtype=a.dtype) + accumulator.data
    return interpreter.TensorHandle(product, accumulator.dtype.scalar)


def _widen(handle):
    if handle.dtype.scalar.is_bf16():
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if handle.dtype.scalar.is_int():
        return handle.data.astype(np.int32)
    return handle.data.astype(np.float32)


_original_cast = interpreter.InterpreterBuilder.cast_impl


def _cast(self, source, target):
    """Conversion to bfloat16 to the nearest, as the hardware does; the original cuts bits off."""
    if source.dtype.scalar.is_fp32() and target.scalar.is_bf16():
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), target.scalar)
    return _original_cast(self, source, target)


interpreter.InterpreterBuilder.create_dot = _multiply
interpreter.InterpreterBuilder.cast_impl = _cast
