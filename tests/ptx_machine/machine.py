"""Runs one PTX kernel: all threads of a block at once as numpy arrays, blocks one after another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import instructions
from .findings import Findings, HangError
from .instructions.operands import Mask, Operation
from .ptx import BasicBlock, Instruction, Kernel
from .state import State

#: Basic blocks of code that a block of threads may go through.
STEPS = 2_000_000


@dataclass
class Flow:
    """The end of a basic block: ``bra``, ``ret``, ``bar``, or ``next``."""

    kind: str
    instruction: Instruction | None = None
    predicate: np.ndarray | None = None
    negated: bool = False
    target: int = -1

    def taken(self) -> np.ndarray | None:
        """The threads for which it holds ``[threads]``; None: all of them."""
        if self.predicate is None:
            return None
        return ~self.predicate if self.negated else self.predicate


class Machine:
    """A kernel made ready for blocks of so many threads and so much shared memory."""

    def __init__(
        self, kernel: Kernel, name: str, shared: int, findings: Findings, shared_base: int
    ) -> None:
        self.name = name
        self.state = State(kernel, shared, findings, shared_base)
        self._code = [self._compile(block) for block in kernel.blocks]

    def run(self, grid: tuple[int, int], blocks: list[tuple[int, int]] | None = None) -> None:
        """All blocks of the grid, or some (x, y) of it."""
        self.state.grid[:, 0] = (*grid, 1)
        self.state.findings.kernel = self.name
        if blocks is None:
            blocks = [(x, y) for y in range(grid[1]) for x in range(grid[0])]
        with np.errstate(all="ignore"):
            for x, y in blocks:
                self.state.begin(x, y)
                self._run_block()

    def _compile(self, block: BasicBlock) -> tuple[list[Operation], Flow]:
        operations, flow = [], Flow("next")
        for i in block.instructions:
            kind = i.op.split(".")[0]
            if kind in ("bra", "ret", "exit", "bar"):
                if kind == "bar" and (i.op != "bar.sync" or i.operands != ["0"] or i.predicate):
                    raise NotImplementedError(str(i))
                predicate = self.state.registers.row(i.predicate) if i.predicate else None
                label = i.operands[-1] if kind == "bra" else None
                target = self.state.kernel.labels[label] if isinstance(label, str) else -1
                flow = Flow("ret" if kind == "exit" else kind, i, predicate, i.negated, target)
            else:
                operations.append(instructions.build(i, self.state))
        return operations, flow

    def _run_block(self) -> None:
        number, state = 0, self.state
        for _ in range(STEPS):  # all threads together
            operations, flow = self._code[number]
            for operation in operations:
                operation(True)
            taken = flow.taken()
            if flow.kind == "bar":
                state.shared.barrier()
            if flow.kind in ("next", "bar") or (taken is not None and not taken.any()):
                number += 1
            elif taken is None or taken.all():
                if flow.kind == "ret":
                    break
                number = flow.target
            else:
                number = self._diverge(number, taken, flow)
                if number < 0:
                    break
        else:
            raise self._hang()
        if any(state.copies) or state.open_copies:
            state.findings.add("ends with asynchronous copies under way", None, self.name)

    def _diverge(self, number: int, taken: np.ndarray, flow: Flow) -> int:
        """Threads take different ways: the ones furthest behind run first, until all are at the
        same place again, which is returned, or have ended: -1."""
        where = np.full(self.state.threads, number + 1)
        ended = np.zeros(self.state.threads, bool)
        waiting = np.zeros(self.state.threads, bool)
        self._advance(flow, taken, where, ended)
        for _ in range(STEPS):
            ready = ~ended & ~waiting
            if not ready.any():
                if ended.all():
                    return -1
                self._meet(where[waiting], ended, flow)
                waiting[:] = False
                continue
            number = int(where[ready].min())
            mask = ready & (where == number)
            if mask.all():
                return number
            operations, flow = self._code[number]
            for operation in operations:
                operation(mask)
            where[mask] = number + 1
            if flow.kind == "bar":
                waiting |= mask
            elif flow.kind != "next":
                goes = flow.taken()
                self._advance(flow, mask if goes is None else mask & goes, where, ended)
        raise self._hang()

    @staticmethod
    def _advance(flow: Flow, goes: Mask, where: np.ndarray, ended: np.ndarray) -> None:
        """Some threads branch, or end."""
        if flow.kind == "ret":
            ended |= goes
        else:
            where[goes] = flow.target

    def _meet(self, places: np.ndarray, ended: np.ndarray, flow: Flow) -> None:
        """All threads that still run wait at a barrier."""
        if ended.any():
            count = np.count_nonzero(ended)
            self.state.findings.add(
                "barrier without threads that have ended", flow.instruction, f"{count} have ended"
            )
        if len(set(places.tolist())) > 1:
            self.state.findings.add(
                "threads wait at different barriers", flow.instruction, str(set(places.tolist()))
            )
        self.state.shared.barrier()

    def _hang(self) -> HangError:
        return HangError(f"{self.name} block {self.state.findings.block}: more than {STEPS} steps")
