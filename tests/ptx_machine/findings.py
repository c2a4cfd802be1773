"""What is found wrong while a kernel runs, which goes on: one fault doesn't hide another."""

from __future__ import annotations

from dataclasses import dataclass, field

from .ptx import Instruction


class HangError(RuntimeError):
    """A kernel doesn't end, or threads wait for each other."""


@dataclass
class Finding:
    """One kind of fault at one instruction, however often it was met."""

    kind: str
    kernel: str
    instruction: Instruction | None
    block: tuple[int, int]
    detail: str
    count: int = 1

    def __str__(self) -> str:
        where = f"line {self.instruction.line}: {self.instruction.text}" if self.instruction else ""
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"[{self.kind}] {self.kernel} block {self.block} {where}: {self.detail}{times}"


@dataclass
class Findings:
    """Collects findings; ``kernel`` and ``block`` say where the machine is."""

    kernel: str = ""
    block: tuple[int, int] = (0, 0)
    _all: dict[tuple[str, str, int | str], Finding] = field(default_factory=dict)

    def add(self, kind: str, instruction: Instruction | None, detail: str) -> None:
        """One entry for each kind, kernel and line."""
        key = (kind, self.kernel, instruction.line if instruction else detail)
        if key in self._all:
            self._all[key].count += 1
        else:
            self._all[key] = Finding(kind, self.kernel, instruction, self.block, detail)

    def take(self) -> list[Finding]:
        """What was found since the last call."""
        found = list(self._all.values())
        self._all.clear()
        return found
