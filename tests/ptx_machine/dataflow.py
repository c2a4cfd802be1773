"""Registers that may be read before anything was written to them."""

from __future__ import annotations

import re
from collections import defaultdict

from .ptx import Address, Instruction, Kernel

_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid)\b")
#: Instructions that write no register.
_STORES = ("st", "stmatrix", "red", "bra", "bar", "ret", "cp", "fence")


def undefined_reads(kernel: Kernel) -> list[tuple[Instruction, str]]:
    """Reads that some way through the kernel leads to without a write before. (A predicated write
    counts: what is left out there can't be told from the text.)"""
    defined: dict[int, set[str]] = {0: set()}  # at the start of a block, on every way to it
    work = [0]
    while work:
        number = work.pop()
        known = set(defined[number])
        for i in kernel.blocks[number].instructions:
            known.update(_written_and_read(i)[0])
        for after in _successors(kernel, number):
            now = known & defined.get(after, known)
            if defined.get(after) != now:
                defined[after] = now
                work.append(after)
    found, parts = [], _parts_read(kernel)
    for number, before in sorted(defined.items()):
        known = set(before)
        for i in kernel.blocks[number].instructions:
            made, used = _written_and_read(i)
            if _packs(i):  # compilers leave a part open that nobody looks at
                used = [x for n, x in enumerate(i.operands[1]) if n in parts[made[0]]]
            found += [(i, x) for x in used if x not in known and not _SPECIAL.match(x)]
            known.update(made)
    return found


def _packs(i: Instruction) -> bool:
    """Whether several registers become the parts of one."""
    return i.op.startswith("mov.") and isinstance(i.operands[1], list)


def _parts_read(kernel: Kernel) -> dict[str, set[int]]:
    """Which parts of each register are read: those that it is taken apart into, or all of them."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for i in (i for block in kernel.blocks for i in block.instructions):
        apart = i.op.startswith("mov.") and isinstance(i.operands[0], list)
        for register in _written_and_read(i)[1]:
            found[register] |= (
                {n for n, x in enumerate(i.operands[0]) if x != "_"} if apart else set(range(8))
            )
    return found


def _successors(kernel: Kernel, number: int) -> list[int]:
    last = kernel.blocks[number].instructions[-1]
    kind = last.op.split(".")[0]
    following = [number + 1] if number + 1 < len(kernel.blocks) else []
    if kind in ("ret", "exit"):
        return following if last.predicate else []
    if kind == "bra":
        target = [kernel.labels[str(last.operands[-1])]]
        return target + following if last.predicate else target
    return following


def _written_and_read(i: Instruction) -> tuple[list[str], list[str]]:
    """Registers that an instruction writes and reads."""
    flat = []
    for operand in i.operands:
        if isinstance(operand, Address):
            flat.append([operand.base])
        else:
            flat.append(operand if isinstance(operand, list) else [operand])
    kind = i.op.split(".")[0]
    stores = kind in _STORES or (kind == "wgmma" and "mma_async" not in i.op)
    writes = 0 if stores else 1
    used = [x for part in flat[writes:] for x in part] + ([i.predicate] if i.predicate else [])
    made = [x for part in flat[:writes] for x in part]
    return [x for x in made if x[0] == "%"], [x for x in used if x[0] == "%"]
