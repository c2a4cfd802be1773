"""What each PTX instruction does: :func:`build` makes a function of the threads that take part."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..ptx import Instruction
from ..state import State
from . import arithmetic, bits, convert, copies, hopper, matrix, memory, warps
from .operands import Mask, Operands, Operation

_MAKERS: dict[str, Callable[[Operands], Operation]] = {
    "add": arithmetic.binary(np.add),
    "sub": arithmetic.binary(np.subtract),
    "mul": arithmetic.mul,
    "mad": arithmetic.mad,
    "fma": arithmetic.fma,
    "div": arithmetic.divide,
    "rem": arithmetic.divide,
    "neg": arithmetic.unary(np.negative),
    "abs": arithmetic.unary(np.abs),
    "ex2": arithmetic.ex2,
    "rsqrt": arithmetic.rsqrt,
    "min": arithmetic.minmax,
    "max": arithmetic.minmax,
    "and": bits.logic(np.bitwise_and, np.logical_and),
    "or": bits.logic(np.bitwise_or, np.logical_or),
    "xor": bits.logic(np.bitwise_xor, np.logical_xor),
    "not": bits.invert,
    "lop3": bits.lop3,
    "shl": bits.shift,
    "shr": bits.shift,
    "bfe": bits.bfe,
    "prmt": bits.prmt,
    "mov": bits.mov,
    "setp": bits.setp,
    "selp": bits.selp,
    "cvt": convert.cvt,
    "ld": memory.ld,
    "st": memory.st,
    "atom": memory.atom,
    "red": memory.red,
    "cp": copies.cp,
    "shfl": warps.shfl,
    "redux": warps.redux,
    "ldmatrix": warps.ldmatrix,
    "stmatrix": warps.stmatrix,
    "mma": matrix.mma,
    "fence": hopper.fence,
    "wgmma": hopper.wgmma,
}
#: Operands that an instruction may have, where that tells forms apart.
_OPERANDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rem", "and", "or", "xor", "shl", "shr"), (3,)),
    **dict.fromkeys(("mad", "fma", "bfe", "prmt", "selp", "mma"), (4,)),
    **dict.fromkeys(("neg", "abs", "ex2", "rsqrt", "not", "mov", "ld", "st", "red"), (2,)),
    **dict.fromkeys(("ldmatrix", "stmatrix"), (2,)),
    **dict.fromkeys(("setp", "atom", "redux"), (3,)),
    **{"cvt": (2, 3), "min": (3, 4), "max": (3, 4), "shfl": (5,), "lop3": (5,)},
}


def build(i: Instruction, m: State) -> Operation:
    """The instruction made ready to work on a state."""
    operands = Operands(i, m)
    name, kind = operands.parts[0], operands.parts[-1]
    maker = _MAKERS.get(name)
    if maker is None or len(i.operands) not in _OPERANDS.get(name, (len(i.operands),)):
        raise operands.unknown()
    if kind.endswith("x2") and name != "cvt":
        maker = bits.signs if name in ("abs", "neg") else arithmetic.packed
    operation = maker(operands)
    if i.predicate is None:
        return operation
    predicate, negated = m.registers.row(i.predicate), i.negated

    def guarded(mask: Mask) -> None:
        goes = ~predicate if negated else predicate
        if mask is not True:
            goes = goes & mask
        if goes.any():
            operation(goes if not goes.all() else True)

    return guarded
