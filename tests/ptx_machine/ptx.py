"""PTX text -> a kernel: parameters, registers, basic blocks of instructions. Nothing runs here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

#: Bytes of a type.
SIZES = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}

_ENDS = ("bra", "ret", "exit", "bar")


class Address(NamedTuple):
    """``[base + offset]``: a register or a symbol."""

    base: str
    offset: int


#: A register, a constant or a label; several registers; an address.
Operand: TypeAlias = "str | list[str] | Address"


@dataclass
class Instruction:
    """One instruction with its guard, ``@p`` or ``@!p``."""

    line: int
    text: str
    op: str
    operands: list[Operand]
    predicate: str | None = None
    negated: bool = False

    def __repr__(self) -> str:
        return f"line {self.line}: {self.text}"


class Parameter(NamedTuple):
    """What cuLaunchKernel has to be given."""

    name: str
    type: str
    pointer: bool

    @property
    def size(self) -> int:
        return SIZES[self.type]


@dataclass
class BasicBlock:
    """Instructions that run one after another; only the last one may branch, wait or return."""

    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    """``registers``: prefix -> type and how many; ``labels``: -> number of the basic block."""

    name: str
    parameters: list[Parameter]
    threads: int
    target: str
    shared_symbol: str | None
    registers: dict[str, tuple[str, int]] = field(default_factory=dict)
    blocks: list[BasicBlock] = field(default_factory=lambda: [BasicBlock()])
    labels: dict[str, int] = field(default_factory=dict)


def parse(source: str) -> Kernel:
    """The one kernel of a PTX file, as Triton writes it. ValueError: something else."""
    head, _, body = source.partition("{\n\t.reg")
    kernel = _declared(head)
    for line, raw in enumerate(("\t.reg" + body).splitlines(), head.count("\n") + 2):
        code = raw.split("//")[0].strip()
        # Braces are the scopes of inline assembly; pragmas are hints.
        if code in ("", "{", "}") or code.startswith(".pragma"):
            continue
        if match := re.fullmatch(r"\.reg \.(\w+)\s+(%?\w+)<(\d+)>;", code):
            kernel.registers[match[2]] = (match[1], int(match[3]))
        elif match := re.fullmatch(r"([$\w]+):", code):
            if kernel.blocks[-1].instructions:
                kernel.blocks.append(BasicBlock())
            kernel.labels[match[1]] = len(kernel.blocks) - 1
        elif code.startswith("."):
            raise ValueError(f"line {line}: {code}")
        else:
            for part in code.split(";"):
                text = part.strip().removeprefix("{").strip()
                if text in ("", "}"):
                    continue
                instruction = _instruction(text, line)
                kernel.blocks[-1].instructions.append(instruction)
                if instruction.op.split(".")[0] in _ENDS:
                    kernel.blocks.append(BasicBlock())
    if not kernel.blocks[-1].instructions:
        kernel.blocks.pop()
    return kernel


def _declared(head: str) -> Kernel:
    """What stands before a kernel's code."""
    name = re.findall(r"\.visible \.entry (\w+)\(", head)
    threads = re.search(r"\.reqntid (\d+)(?:, *1, *1)?\n", head)
    target = re.search(r"\.target (\w+)", head)
    if len(name) != 1 or threads is None or target is None:
        raise ValueError("not one kernel with .target and .reqntid")
    parameters = [
        Parameter(m[3], m[1], bool(m[2]))
        for m in re.finditer(r"\.param \.(\w+) (\.ptr [^,\n)]*?)?(\w+),?\n", head)
    ]
    if len(parameters) != head.count(".param "):
        raise ValueError("a parameter of a kind that isn't known")
    shared = re.search(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];", head)
    return Kernel(name[0], parameters, int(threads[1]), target[1], shared and shared[1])


def _instruction(code: str, line: int) -> Instruction:
    text, predicate, negated = code, None, False
    if code.startswith("@"):
        guard, code = code[1:].split(None, 1)
        negated, predicate = guard.startswith("!"), guard.lstrip("!")
    op, *rest = code.split(None, 1)
    return Instruction(line, text, op, _operands("".join(rest)), predicate, negated)


def _operands(text: str) -> list[Operand]:
    parts, depth, last = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[last:place])
            last = place + 1
    parts.append(text[last:])
    return [_operand(p.strip()) for p in parts if p.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return [x.strip() for x in text[1:-1].split(",")]
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text
