"""A stand-in for the CUDA driver library: notes every call and reads what a launch would read.

Its functions are real C functions to ctypes, so that arguments are converted as for the driver.
"""

# ruff: noqa: N802 - functions are called as in the driver

from __future__ import annotations

import ctypes
from typing import Any

from comfyui_liteattention.backends.gpu.driver import _SIGNATURES
from comfyui_liteattention.backends.gpu.kernel_table import KERNELS, TRAILING_POINTERS

_PARAMETERS = {kernel.entry.name: kernel.entry.parameters for kernel in KERNELS}
_TYPES = {"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}


class FakeLibrary:
    """Has the driver's functions as attributes. ``failing`` names one that returns an error,
    ``error``."""

    def __init__(self, failing: str | None = None) -> None:
        self.calls: list[str] = []
        self.images: list[bytes] = []
        self.attributes: list[tuple[int, int]] = []
        self.launches: list[dict[str, Any]] = []
        self.contexts: list[int] = []  # the stack of the current thread
        self.capture = 0
        self.entries: dict[int, str] = {}
        self.failing = failing
        self.error = 209
        self.cuda = 12080
        for name, arguments in _SIGNATURES.items():
            prototype = ctypes.CFUNCTYPE(ctypes.c_int, *arguments)
            setattr(self, name, prototype(self._noting(name)))

    def _noting(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.calls.append(name)
            try:
                getattr(self, f"_{name}", lambda *_: None)(*arguments)
            except AssertionError:
                return 999
            return self.error if name == self.failing else 0

        return function

    def _cuDriverGetVersion(self, version):
        version[0] = self.cuda

    def _cuGetErrorString(self, status, text):
        text[0] = b"no kernel image is available"

    def _cuDeviceGet(self, handle, ordinal):
        handle[0] = ordinal

    def _cuDevicePrimaryCtxRetain(self, context, handle):
        context[0] = 1000 + handle

    def _cuCtxPushCurrent_v2(self, context):
        self.contexts.append(context)

    def _cuCtxPopCurrent_v2(self, context):
        context[0] = self.contexts.pop()

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        self.capture, mode[0] = mode[0], self.capture

    def _cuModuleLoadData(self, module, image):
        assert self.contexts, "no context is current"
        assert self.capture == 2, "a capture would forbid this"
        self.images.append(image)
        module[0] = 2000 + len(self.images)

    def _cuModuleGetFunction(self, function, module, name):
        function[0] = module + 1000
        self.entry = name
        self.entries[function[0]] = name.decode()

    def _cuFuncSetAttribute(self, function, attribute, value):
        self.attributes.append((attribute, value))

    def _cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, pointers, extra):
        assert not extra
        arguments = {}
        parameters = _PARAMETERS[self.entries[function]]
        for place, (name, type_) in enumerate(parameters):
            # As the driver does: the array holds the address of each argument.
            arguments[name] = _TYPES.get(type_, ctypes.c_uint64).from_address(pointers[place]).value
        trailing = [
            ctypes.c_uint64.from_address(pointers[len(parameters) + i]).value
            for i in range(TRAILING_POINTERS)
        ]
        self.launches.append(
            {
                "entry": self.entries[function],
                "context": self.contexts[-1],
                "grid": (gx, gy, gz),
                "block": (bx, by, bz),
                "shared": shared,
                "stream": stream,
                "arguments": arguments,
                "trailing": trailing,
            }
        )
