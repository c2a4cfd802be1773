"""What every instruction needs: its operands as rows of numpy arrays ``[threads]``."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ..ptx import Address, Instruction
from ..state import State

#: The threads that take part: all of them (True), or ``[threads]`` bool.
Mask: TypeAlias = Any
#: An instruction made ready: works on those threads.
Operation: TypeAlias = Callable[[Mask], None]

TYPES: dict[str, Any] = {
    **{f"{k}{n}": np.dtype(f"uint{n}") for k in "bu" for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"int{n}") for n in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
_SMALLEST = np.float32(2.0**-126)


class UnknownInstructionError(NotImplementedError):
    """An instruction that the machine doesn't know: an error when a kernel is loaded, not when the
    instruction is reached."""


class Operands:
    """An instruction ``i`` and its operands in the state ``m``; ``parts``: its name at the dots."""

    def __init__(self, i: Instruction, m: State) -> None:
        self.i, self.m = i, m
        self.parts = i.op.split(".")

    def __getitem__(self, n: int) -> Any:
        return self.i.operands[n]

    def unknown(self, why: str = "") -> UnknownInstructionError:
        return UnknownInstructionError(f"{self.i} {why}".strip())

    def source(self, operand: Any, kind: str) -> Any:
        """A register as an array of this type, or a constant."""
        if not isinstance(operand, str):
            raise self.unknown(f"operand {operand}")
        if kind == "pred":
            if operand[0] == "%":
                return self.m.registers.row(operand)
            return np.bool_(int(operand))
        type_ = TYPES[kind]
        if operand in self.m.special:
            array = self.m.special[operand]
        elif operand in self.m.symbols:
            return np.array(self.m.symbols[operand]).astype(type_)[()]
        elif re.match(r"[-0-9]", operand):
            return constant(operand, type_)
        else:
            array = self.m.registers.row(operand)
        if array.dtype.itemsize == type_.itemsize:
            return array.view(type_)
        if array.dtype.itemsize > type_.itemsize:  # the low part
            step = array.dtype.itemsize // type_.itemsize
            return array.view(type_)[::step]
        raise self.unknown(f"{operand} is too narrow for {kind}")

    def target(self, operand: Any, kind: str) -> np.ndarray:
        """A register to write to, as an array of this type."""
        if kind == "pred":
            return self.m.registers.row(operand)
        array, type_ = self.m.registers.row(operand), TYPES[kind]
        if array.dtype.itemsize != type_.itemsize:
            raise self.unknown(f"{operand} isn't {kind}")
        return array.view(type_)

    def addresses(self, operand: Address, kind: str) -> Callable[[], np.ndarray]:
        """The addresses of all threads at the time of the call."""
        base = self.source(operand.base, kind)
        offset = constant(str(operand.offset), TYPES[kind])
        shape = np.zeros(self.m.threads, TYPES[kind])
        return lambda: base + offset + shape


def constant(text: str, type_: Any) -> Any:
    """A number as PTX writes it."""
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        bits = np.frombuffer(struct.pack("<I", int(match[1], 16)), np.uint32)
    elif match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        bits = np.frombuffer(struct.pack("<Q", int(match[1], 16)), np.uint64)
    else:
        number = int(text.rstrip("U"), 0)
        if type_.kind == "f":
            return type_.type(number)
        low = number & ((1 << 8 * type_.itemsize) - 1)
        return np.array(low, f"u{type_.itemsize}").view(type_)[()]
    return bits.view(type_)[0]


def flush(x: Any) -> Any:
    """Subnormal float32 -> 0 of the same sign."""
    return np.where(np.abs(x) < _SMALLEST, np.copysign(np.float32(0), x), x)


def assign(target: np.ndarray, compute: Callable[[], Any]) -> Operation:
    """Compute for all threads, store for those that take part."""

    def run(mask: Mask) -> None:
        np.copyto(target, compute(), where=mask, casting="unsafe")

    return run


def ufunc(function: np.ufunc, target: np.ndarray, *sources: Any) -> Operation:
    """A numpy function straight into the target."""

    def run(mask: Mask) -> None:
        if mask is True:
            function(*sources, target)
        else:
            function(*sources, target, where=mask)

    return run
