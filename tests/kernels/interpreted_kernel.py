"""Run the kernel in the Triton interpreter, on CPU tensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import triton
from triton.runtime import interpreter

from comfyui_liteattention.backends.base import Mode
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.jit import source
from comfyui_liteattention.backends.gpu.kernel_table import CRITERIA, NATIVE, TILE, Method
from comfyui_liteattention.backends.gpu.kernels.attend import attend_tiles
from comfyui_liteattention.backends.gpu.launch import Launch
from comfyui_liteattention.backends.gpu.launches import CONSTRAINTS

#: The version whose interpreter the bfloat16 corrections below were written for.
TESTED_TRITON = "3.9.0"


class Interpreter:
    """Launches kernels in the Triton interpreter, which multiply in one way, whatever the mode."""

    name = "interpreter"
    tile = TILE
    criteria = CRITERIA

    def __init__(self, method: Method) -> None:
        self._method = method

    def missing(self, device: torch.device, mode: Mode) -> None:
        return None

    def method(self, device: torch.device, mode: Mode, head_dim: int, dtype: str) -> Method:
        return self._method

    def launch(self, launch: Launch, device: torch.device) -> None:
        interpret(launch)


class InterpreterBackend(KernelBackend):
    """A backend like the real ones, for tests."""

    running_scores = False  # scores are checked against the final ones

    def __init__(self, method: Method = NATIVE) -> None:
        super().__init__(Interpreter(method))

    def unsupported(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
        return replace(CONSTRAINTS, device="cpu").check(q, k, v)

    def provide(self, device, head_dim, dtype):
        return self

    def _forward(self, call, *rest):
        assert (reason := self.unsupported(*call[:3])) is None, reason
        return super()._forward(call, *rest)

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
    8-bit integers as such. Sums in fp16 are rounded after 8 products each; a matrix instruction
    takes 16 or 32 and may do so once."""
    a, b = (_widen(x) for x in (a, b))
    kind = accumulator.dtype.scalar
    if not kind.is_fp16():
        return interpreter.TensorHandle(np.matmul(a, b, dtype=a.dtype) + accumulator.data, kind)
    total = accumulator.data
    with np.errstate(over="ignore"):
        for first in range(0, a.shape[-1], 8):
            some = slice(first, first + 8)
            total = (total + np.matmul(a[..., some], b[..., some, :])).astype(np.float16)
    return interpreter.TensorHandle(total, kind)


def _widen(handle):
    kind = handle.dtype.scalar
    if kind.is_bf16():
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind.is_fp8e4nv():
        bits = torch.from_numpy(np.ascontiguousarray(handle.data))
        return bits.view(torch.float8_e4m3fn).float().numpy()
    return handle.data.astype(np.int32 if kind.is_int() else np.float32)


_original_cast = interpreter.InterpreterBuilder.cast_impl
_original_rounding = interpreter.InterpreterBuilder.create_fp_to_fp


def _cast(self, source, target):
    """Conversion to bfloat16 to the nearest, as the hardware does; the original cuts bits off."""
    if source.dtype.scalar.is_fp32() and target.scalar.is_bf16():
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), target.scalar)
    return _original_cast(self, source, target)


def _to_float8(self, source, target, rounding):
    """The same to and from e4m3; what is too large becomes the largest number, as on a card."""
    if source.dtype.scalar.is_fp8e4nv() and target.scalar.is_fp32():
        return interpreter.TensorHandle(_widen(source), target.scalar)
    if source.dtype.scalar.is_fp32() and target.scalar.is_fp8e4nv():
        x = torch.from_numpy(np.ascontiguousarray(source.data)).clamp(-448, 448)
        bits = x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(bits, target.scalar)
    return _original_rounding(self, source, target, rounding)


interpreter.InterpreterBuilder.create_dot = _multiply
interpreter.InterpreterBuilder.cast_impl = _cast
interpreter.InterpreterBuilder.create_fp_to_fp = _to_float8
