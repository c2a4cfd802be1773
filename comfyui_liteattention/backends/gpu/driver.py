"""The few calls of the CUDA driver that load and launch a kernel, through ctypes.

The driver comes with the graphics card on Windows and Linux, so this needs no compiler, no CUDA
toolkit and no binary of our own. Tested with a stand-in for the library; **not on a GPU yet**.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from typing import Any, NamedTuple

import torch

_OUT = POINTER(c_void_p)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (_OUT, c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_OUT,),
    "cuThreadExchangeStreamCaptureMode": (POINTER(c_int),),
    "cuModuleLoadData": (_OUT, c_char_p),
    "cuModuleGetFunction": (_OUT, c_void_p, c_char_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, _OUT, _OUT),
}
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PREFERRED_SHARED = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, percent
#: Bytes a block, from which on shared memory decides how many blocks a multiprocessor holds.
_MUCH_SHARED = 32 << 10
_CAPTURE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_WARP = 32
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY

#: Errors of loading: invalid image, no binary for this card, invalid PTX, unknown PTX version.
_REFUSED = (200, 209, 218, 222)

#: CUDA version, as ``cuDriverGetVersion`` tells it -> the branch of drivers that brought it.
SINCE = {
    **{11000: 450, 11010: 455, 11020: 460, 11030: 465, 11040: 470, 11050: 495, 11060: 510},
    **{11070: 515, 11080: 520},
    **{12000: 525, 12010: 530, 12020: 535, 12030: 545, 12040: 550, 12050: 555, 12060: 560},
    **{12070: 565, 12080: 570, 12090: 575, 13000: 580, 13010: 590},
}

#: Triton's types -> struct codes; every pointer is alike.
_CODES = {"fp32": "f", "i32": "i", "i64": "q"}


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class DriverOutOfMemoryError(DriverError, torch.OutOfMemoryError):
    """The same, for want of memory on the card: handled as where torch lacks it."""


class ImageRefusedError(DriverError):
    """The driver doesn't take this machine code or PTX: most often it is too old for it."""


class Loaded(NamedTuple):
    """A loaded kernel of one device, with what a launch needs."""

    function: c_void_p
    context: c_void_p
    threads: int
    shared: int


class Driver:
    """The CUDA driver library.

    Calls give up Python's lock, as torch's do. To keep it (``ctypes.PyDLL``) would spare a launch
    about 10 us beside a thread that never rests (measured with C functions that take as long), and
    two threads could wait for each other for ever: a launch blocks where a card's queue is full,
    maybe behind an exchange with another card, which another thread has yet to launch.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library if library is not None else _open_library()
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise DriverError(f"this NVIDIA driver is too old: it has no {name}")
            function.argtypes, function.restype = arguments, c_int
        self._contexts: dict[int, c_void_p] = {}
        self._call("cuInit", 0)
        version = c_int()
        self._call("cuDriverGetVersion", byref(version))
        #: The branch of drivers that this one belongs to, as 570; 0 where it is older than 450.
        self.branch = max((b for cuda, b in SINCE.items() if cuda <= version.value), default=0)

    def load(self, device: int, image: bytes, entry: str, warps: int, shared: int) -> Loaded:
        """A cubin or PTX text -> the kernel ``entry``, on the device of this number."""
        module, function = c_void_p(), c_void_p()
        context = self._context(device)
        with self._current(context), self._loading():
            # PTX is text and must end with a zero byte; a cubin doesn't mind one.
            self._call("cuModuleLoadData", byref(module), image + b"\0")
            self._call("cuModuleGetFunction", byref(function), module, entry.encode())
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
            if shared > _MUCH_SHARED:
                # Of the memory that it divides with the cache: else there might be room for one
                # block where two were planned. A mere hint, so whether it's taken isn't checked.
                self._library.cuFuncSetAttribute(function, _PREFERRED_SHARED, 100)
        return Loaded(function, context, warps * _WARP, shared)

    def launch(
        self, kernel: Loaded, grid: tuple[int, int], stream: int, pointers: ctypes.Array[c_void_p]
    ) -> None:
        """Launch on a stream. ``pointers`` point at the arguments, which are copied at once."""
        library = self._library
        # Written out, because it runs at every call: a context manager costs more than the launch.
        self._check("cuCtxPushCurrent_v2", library.cuCtxPushCurrent_v2(kernel.context))
        status = library.cuLaunchKernel(
            kernel.function,
            *(*grid, 1),
            *(kernel.threads, 1, 1),
            kernel.shared,
            stream,
            pointers,
            None,
        )
        library.cuCtxPopCurrent_v2(byref(c_void_p()))
        self._check("cuLaunchKernel", status)

    def _context(self, device: int) -> c_void_p:
        """The device's primary context, the one that torch uses."""
        if device not in self._contexts:
            handle, context = c_int(), c_void_p()
            self._call("cuDeviceGet", byref(handle), device)
            self._call("cuDevicePrimaryCtxRetain", byref(context), handle)
            self._contexts[device] = context
        return self._contexts[device]

    @contextmanager
    def _current(self, context: c_void_p) -> Iterator[None]:
        """Any thread may call, whatever device is current there."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Loading is forbidden while a CUDA graph is captured, unless the thread insists."""
        mode = c_int(_CAPTURE_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", byref(mode))

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, status: int) -> None:
        if status:
            text = c_char_p()
            self._library.cuGetErrorString(status, byref(text))
            reason = text.value.decode(errors="replace") if text.value else "unknown error"
            if status == _OUT_OF_MEMORY:
                raise DriverOutOfMemoryError(f"{name}: {reason}")
            if status in _REFUSED:
                raise ImageRefusedError(f"{name}: {reason} (CUDA driver error {status})")
            raise DriverError(f"{name}: {reason} (CUDA driver error {status})")


class ArgumentBlock(threading.local):
    """Memory for a kernel's arguments, one per thread: laid out once, refilled at each launch."""

    def __init__(self, types: Sequence[str]) -> None:
        codes = [_CODES.get(t, "P") for t in types]
        self._packer = struct.Struct("@" + "".join(codes))
        self._buffer = ctypes.create_string_buffer(self._packer.size)
        start = ctypes.addressof(self._buffer)
        ends = [struct.calcsize("@" + "".join(codes[: i + 1])) for i in range(len(codes))]
        places = [
            start + end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)
        ]
        self._pointers = (c_void_p * len(places))(*places)

    def fill(self, values: Sequence[int | float]) -> ctypes.Array[c_void_p]:
        """Write the values; returns the array of pointers to them that a launch wants."""
        self._packer.pack_into(self._buffer, 0, *values)
        return self._pointers


def _open_library() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise DriverError(f"no NVIDIA driver: {name} can't be loaded ({error})") from error
