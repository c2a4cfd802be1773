"""What the assembler made of every prebuilt kernel: registers, spills, occupancy, instructions.

    python kernels/inspect.py [--json] [--arch 90] [--match d128_bf16] [--no-code] [--folder DIR]
    python kernels/inspect.py --json --modes > benchmarks/results/kernels.json

Per kernel: registers, bytes of stack and spill instructions, shared memory, blocks that fit on one
multiprocessor, and, for the loop over key tiles, instructions and tensor-core instructions. "over
dense" compares the loop with that of the dense kernel without scores. Needs triton, for cuobjdump,
and about half a second a kernel; --no-code leaves out what needs the disassembly. The second line
is for the table of modes in README.md (``python -m benchmarks.tables``).
"""

# ruff: noqa: E402 - sys.path must be set right before anything else is imported

import os
import sys

# Not this folder, whose inspect.py would hide the standard library's, but its parent.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from comfyui_liteattention.backends.gpu.archive import FOLDER, Prebuilt
from comfyui_liteattention.backends.gpu.kernel_table import KERNELS

#: Per multiprocessor: registers, and shared memory in bytes by compute capability.
REGISTERS = 65536
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48, 121: 48}
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100, 121: 100}
SHARED_PER_BLOCK = 1024  # what the driver keeps of it in every block

#: Opcodes of matrix instructions: Ampere to Ada and consumer Blackwell, Hopper, Blackwell; the
#: same for INT8; FP8.
TENSOR = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "UTCIMMA", "QMMA")
SPILLS = ("STL", "LDL")

#: What modes are compared by: what runs most, and what it is compared with.
MODES = "^d128_bf16_.*(dense_plain|lists_mass)$"

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_ENDS = ("EXIT", "RET", "BRA")


class Instruction(NamedTuple):
    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a branch may go to."""
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(found[-1], 16) if self.opcode.startswith("BRA") and found else None

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow: always, but after an unconditional branch."""
        always = not self.guard and "P" not in self.operands
        return not (always and self.opcode.split(".")[0] in _ENDS)


def dump(cubin: bytes, *options: str) -> str:
    """What cuobjdump prints."""
    found = find_spec("triton")
    if found is None or found.origin is None:
        sys.exit("inspect needs triton, which brings cuobjdump: pip install triton")
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> list[Instruction]:
    """The machine code, in order."""
    found = _INSTRUCTION.findall(dump(cubin, "-sass"))
    return [Instruction(int(address, 16), *rest) for address, *rest in found]


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest loop: that over key tiles. To it belongs what a backward branch may lead to and
    what may lead back to it; the assembler puts other code in between."""
    place = {instruction.address: n for n, instruction in enumerate(code)}
    after: dict[int, list[int]] = defaultdict(list)
    before: dict[int, list[int]] = defaultdict(list)
    back = []
    for n, instruction in enumerate(code):
        following = [n + 1] if instruction.goes_on else []
        if instruction.target is not None:
            following.append(place[instruction.target])
            if instruction.target < instruction.address:
                back.append((n, place[instruction.target]))
        for other in following:
            after[n].append(other)
            before[other].append(n)
    loops = [_reached(start, after) & _reached(end, before) for end, start in back]
    return [code[n] for n in sorted(max(loops, key=len, default=()))]


def _reached(start: int, edges: dict[int, list[int]]) -> set[int]:
    found, work = {start}, [start]
    while work:
        fresh = set(edges[work.pop()]) - found
        found |= fresh
        work += fresh
    return found


def blocks_per_multiprocessor(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks are resident at once (registers are handed out 256 per warp and step)."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (per_warp * warps)
    by_shared = SHARED[arch] * 1024 // (shared + SHARED_PER_BLOCK)
    return min(by_registers, by_shared, WARPS[arch] // warps)


def usage(arch: int, cubin: bytes, entry: dict[str, Any]) -> dict[str, Any]:
    """Registers, stack (spilled registers live there), shared memory and occupancy."""
    text = dump(cubin, "-res-usage")
    registers, stack, local = (_number(word, text) for word in ("REG", "STACK", "LOCAL"))
    blocks = blocks_per_multiprocessor(arch, registers, entry["shared"], entry["warps"])
    return {
        "registers": registers,
        "stack": stack + local,
        "shared": entry["shared"],
        "warps": entry["warps"],
        "blocks": blocks,
        "bytes": len(cubin),
    }


def _number(word: str, text: str) -> int:
    found = re.search(rf"\b{word}:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump doesn't tell {word}: {text}")
    return int(found[1])


def instructions(cubin: bytes) -> dict[str, Any]:
    """Counts of what matters, in the whole kernel and in its loop over key tiles."""
    code = disassemble(cubin)
    loop = main_loop(code)
    count, in_loop = (Counter(i.opcode.split(".")[0] for i in part) for part in (code, loop))
    return {
        "spills": sum(count[o] for o in SPILLS),
        "tensor": {o: count[o] for o in TENSOR if count[o]},
        "loop": len(loop),
        "loop_tensor": sum(in_loop[o] for o in TENSOR),
        "loop_barriers": in_loop["BAR"],
    }


def inspect(
    folder: Path = FOLDER, arch: int | None = None, match: str = "", code: bool = True
) -> dict[str, dict[str, Any]]:
    """``"sm_90/d128_bf16_lists_mass"`` -> what there is to say about it."""
    prebuilt = Prebuilt(folder)
    result: dict[str, dict[str, Any]] = {}
    known = {kernel.name: kernel for kernel in KERNELS}
    for name, archive in prebuilt.manifest["archives"].items():
        if name == "ptx" or arch not in (None, archive["arch"]):
            continue
        for kernel, entry in archive["kernels"].items():
            if not re.search(match, kernel):
                continue
            cubin = prebuilt.read(name, known[kernel]).image
            found = result[f"{name}/{kernel}"] = usage(archive["arch"], cubin, entry)
            if code:
                found |= instructions(cubin)
    for name, found in result.items() if code else ():
        plain, changed = re.subn(r"_(dense|lists)_\w+$", "_dense_plain", name)
        dense = result.get(plain) if changed else None
        found["over_dense"] = found["loop"] / dense["loop"] - 1 if dense else None
    return result


def table(found: dict[str, dict[str, Any]]) -> str:
    """The same, for reading."""
    columns = ("registers", "stack", "shared", "warps", "blocks", "loop", "loop_tensor")
    lines = [f"{'kernel':32}" + "".join(f"{c:>12}" for c in columns) + f"{'over dense':>12}  MMA"]
    for name, kernel in found.items():
        over = kernel.get("over_dense")
        mma = ", ".join(f"{n} {o}" for o, n in kernel.get("tensor", {}).items())
        cells = "".join(f"{kernel.get(c, ''):>12}" for c in columns)
        lines.append(f"{name:32}{cells}{'' if over is None else f'{over:+.1%}':>12}  {mma}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--arch", type=int, help="one architecture, e.g. 90; default: all")
    parser.add_argument("--match", default="", metavar="REGEX", help="only these kernels")
    parser.add_argument("--modes", action="store_const", dest="match", const=MODES)
    parser.add_argument("--no-code", action="store_true", help="registers and memory only: quick")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: the package's")
    args = parser.parse_args()
    found = inspect(args.folder, args.arch, args.match, not args.no_code)
    print(json.dumps(found, indent=1) if args.json else table(found))


if __name__ == "__main__":
    main()
