"""A stand-in for ``libcuda`` that runs PTX on the machine, and checks what a launch is given."""

# ruff: noqa: N802 - functions are called as in the driver

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comfyui_liteattention.backends.gpu.driver import _SIGNATURES
from comfyui_liteattention.backends.gpu.kernel_table import TRAILING_POINTERS
from comfyui_liteattention.backends.gpu.launch import Launch

from . import ptx
from .dataflow import undefined_reads
from .findings import Findings
from .global_memory import Global, Region, lazy_zeros
from .machine import Machine

#: What each kernel writes: parameter -> whether it has to write all of it.
OUTPUTS: dict[str, dict[str, bool]] = {
    "attend_tiles": {
        **{"out": True, "lse": True, "score": False},
        **{"full_out": True, "full_lse": True},
    },
    "quantise_queries": {"values": True, "unit": True, "shift": True},
    "quantise_keys": {"values": True, "unit": True, "means": True},
    "peak_values": {"peak": False},
    "scale_values": {"values": True, "unit": True, "means": True},
    "mark_tiles": {"following": True},
    "count_scores": {"counts": False},
    "choose_limit": {"limit": True, "all_back": True, "after": True},
    "list_tiles": {"count": True, "index": True},
    "add_skipped": {"out": False},
    "audit_skipped": {"sums": True},
}
#: Shared memory of a block that a launch gets without being asked for.
DEFAULT_SHARED = 48 << 10
#: The most that a card gives one block.
MOST_SHARED = {
    **dict.fromkeys(("sm_80",), 163 << 10),
    **dict.fromkeys(("sm_90", "sm_90a"), 227 << 10),
    **dict.fromkeys(("sm_86", "sm_89", "sm_120", "sm_120a", "sm_121", "sm_121a"), 99 << 10),
}
_MAX_DYNAMIC_SHARED = 8
#: Bytes of an element, by Triton's names.
_BYTES = {"fp32": 4, "i32": 4, "i64": 8, "fp64": 8, "u8": 1, "i8": 1}
_BYTES |= {"fp16": 2, "bf16": 2, "fp8e4nv": 1}
#: Larger tensors are there for their strides: not looked through as a whole.
_LARGE = 1 << 28


class MachineLibrary:
    """Its functions are real C functions to ctypes. ``edit``: kernel name -> what is done to its
    text, to plant faults. ``shared_base``: where a block's shared memory starts."""

    def __init__(
        self, edit: dict[str, Callable[[str], str]] | None = None, shared_base: int = 1024
    ) -> None:
        self.findings = Findings()
        self.edit, self.shared_base = edit or {}, shared_base
        #: What is about to be launched, from whoever launches: says which tensors pointers are of.
        self.expected: Launch | None = None
        #: Only these blocks (x, y) of a grid, or None: all.
        self.only_blocks: list[tuple[int, int]] | None = None
        self.ran: dict[str, int] = {}
        self.error: BaseException | None = None
        self._kernels: dict[int, ptx.Kernel] = {}
        self._machines: dict[tuple[int, int], Machine] = {}
        self._dynamic: dict[int, int] = {}
        self._contexts: list[int] = []
        self._capture = 0
        for name, arguments in _SIGNATURES.items():
            prototype = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)
            setattr(self, name, prototype(self._guarded(name)))

    def _guarded(self, name: str) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            try:
                getattr(self, f"_{name}", lambda *_: None)(*arguments)
            except BaseException as error:  # nothing may pass through C
                self.error = error
                return 719
            return 0

        return function

    def _cuGetErrorString(self, status: int, text: Any) -> None:
        text[0] = b"the PTX machine failed"

    def _cuDeviceGet(self, handle: Any, ordinal: int) -> None:
        handle[0] = ordinal

    def _cuDriverGetVersion(self, version: Any) -> None:
        version[0] = 13_000

    def _cuDevicePrimaryCtxRetain(self, context: Any, handle: int) -> None:
        context[0] = 1000 + handle

    def _cuCtxPushCurrent_v2(self, context: int) -> None:
        self._contexts.append(context)

    def _cuCtxPopCurrent_v2(self, context: Any) -> None:
        context[0] = self._contexts.pop()

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:
        self._capture, mode[0] = mode[0], self._capture

    def _cuModuleLoadData(self, module: Any, image: bytes) -> None:
        assert self._contexts and self._capture == 2 and self.expected is not None
        name, text = self.expected.kernel.name, image.decode()
        text = self.edit.get(name, str)(text)
        kernel = ptx.parse(text)
        self.findings.kernel = name
        for instruction, register in undefined_reads(kernel):
            self.findings.add("register read before written", instruction, register)
        module[0] = 2000 + len(self._kernels)
        self._kernels[module[0] + 1000] = kernel

    def _cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> None:
        function[0] = module + 1000
        assert self._kernels[function[0]].name == name.decode()

    def _cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> None:
        if attribute == _MAX_DYNAMIC_SHARED:
            assert value <= MOST_SHARED[self._kernels[function].target], f"{value} bytes"
            self._dynamic[function] = value

    def _cuLaunchKernel(
        self, function: int, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, *rest: Any
    ) -> None:
        shared, _, pointers, extra = rest
        assert not extra and self._contexts and self.expected is not None
        launch, self.expected = self.expected, None
        kernel, name, find = self._kernels[function], launch.kernel.name, self.findings
        find.kernel, find.block = name, (0, 0)
        if shared > self._dynamic.get(function, DEFAULT_SHARED):
            find.add("shared memory", None, f"{shared}, allowed {self._dynamic.get(function)}")
        if (bx, by, bz) != (kernel.threads, 1, 1):
            find.add("block size", None, f"{(bx, by, bz)}, .reqntid {kernel.threads}")
            return
        if not (0 < gx < 2**31 and 0 < gy < 2**16 and gz == 1):
            find.add("grid", None, f"{(gx, gy, gz)}")
            return
        values = read_parameters(kernel, pointers, find)
        regions = bind(kernel, launch, values, find)
        key = (function, shared)
        if key not in self._machines:
            self._machines[key] = Machine(kernel, name, shared, find, self.shared_base)
        state = self._machines[key].state
        state.memory, state.parameters = Global(regions, find), values
        self._machines[key].run((gx, gy), self.only_blocks)
        self.ran[name] = self.ran.get(name, 0) + 1
        if self.only_blocks is None:
            check_outputs(launch, regions, find)


def read_parameters(kernel: ptx.Kernel, pointers: Any, find: Findings) -> dict[str, bytes]:
    """What cuLaunchKernel reads: as many bytes at each address as the PTX says."""
    values, spans = {}, []
    for n, parameter in enumerate(kernel.parameters):
        address = pointers[n]
        if not address:
            find.add("null in kernelParams", None, f"parameter {n}")
            values[parameter.name] = bytes(parameter.size)
            continue
        if address % parameter.size:
            find.add("misaligned parameter", None, f"parameter {n}")
        spans.append((address, address + parameter.size, n))
        values[parameter.name] = ctypes.string_at(address, parameter.size)
    for (_, end, n), (start, _, other) in pairwise(sorted(spans)):
        if end > start:
            find.add("parameters overlap", None, f"parameters {n} and {other}")
    return values


def bind(
    kernel: ptx.Kernel, launch: Launch, values: dict[str, bytes], find: Findings
) -> dict[int, Region]:
    """The memory that pointers point at, by the number of the parameter + 1, with which the
    pointers in ``values`` are tagged."""
    declared = launch.kernel.entry.parameters
    if len(kernel.parameters) != len(declared) + TRAILING_POINTERS:
        find.add("number of parameters", None, f"{len(kernel.parameters)}, {len(declared)} + 2")
    regions = {}
    for n, parameter in enumerate(kernel.parameters):
        raw = values[parameter.name]
        if n >= len(declared):
            if any(raw):
                find.add("trailing parameter isn't 0", None, f"parameter {n}")
            continue
        (label, type_), argument = declared[n], launch.arguments[n]
        if type_.startswith("*") != parameter.pointer:
            find.add("kind of parameter", None, f"parameter {n}, {label}: {type_}")
        elif not parameter.pointer:
            if _BYTES[type_] != parameter.size:
                find.add("size of parameter", None, f"parameter {n}, {label}: {type_}")
        elif isinstance(argument, Tensor):
            address = int.from_bytes(raw, "little")
            resolved = launch.kernel.types.get(type_[1:], type_[1:])
            if address != argument.data_ptr():
                find.add("pointer of another tensor", None, label)
            elif argument.element_size() != _BYTES[resolved]:
                find.add("dtype of a tensor", None, f"{label}: {argument.dtype}, {resolved}")
            elif argument.numel():  # nothing may be touched of an empty one: no tag
                writable = label in OUTPUTS[launch.kernel.entry.name]
                regions[n + 1] = region_of(label, argument, writable)
                values[parameter.name] = (address | (n + 1) << 48).to_bytes(8, "little")
        elif any(raw):
            find.add("a pointer to nothing isn't 0", None, label)
    return regions


def region_of(label: str, tensor: Tensor, writable: bool) -> Region:
    """The memory of a tensor's elements, from the first to the last one."""
    start, size = tensor.data_ptr(), tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    extent = (sum((n - 1) * s for n, s in steps) + 1) * size
    aligned = start & ~15
    length = start - aligned + extent
    memory = np.frombuffer((ctypes.c_uint8 * length).from_address(aligned), np.uint8)
    allowed = None
    if extent != tensor.numel() * size:
        allowed = lazy_zeros(length)
        inside = torch.from_numpy(allowed[start - aligned :])
        strides = [s * size for s in tensor.stride()]
        inside.as_strided((*tensor.shape, size), (*strides, 1)).fill_(1)
    return Region(label, start, memory, allowed, writable)


def check_outputs(launch: Launch, regions: dict[int, Region], find: Findings) -> None:
    """Note elements of an output that nobody has written."""
    entry, name = launch.kernel.entry, launch.kernel.name
    for number, region in regions.items():
        label = entry.parameters[number - 1][0]
        complete = OUTPUTS[entry.name].get(label, False)
        if not (complete or (label == "score" and "_dense_" in name)):
            continue
        if region.shadow is None:
            find.add("output not written", None, label)
        elif len(region.memory) <= _LARGE:
            span = slice(region.start - region.aligned, None)
            missing = region.shadow[span] == 0
            if region.allowed is not None:
                missing &= region.allowed[span] != 0
            if missing.any():
                first = int(np.flatnonzero(missing)[0])
                count = np.count_nonzero(missing)
                find.add("output not written", None, f"{label}, {count} bytes, first {first}")
