"""Rows far apart: MiniMax H3 gives views of one buffer whose rows are 21,504 elements apart, so
that offsets leave 32 bits at row 99,864. Here they are so far apart that they do within two tiles,
in memory that is only promised: nobody touches what lies between the rows."""

import mmap
import sys

import pytest
import torch

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.cpu.backend import CpuBackend
from comfyui_liteattention.backends.gpu.kernel_table import Method

pytest.importorskip("triton", reason="triton is not installed: there is no kernel to interpret")
pytest.importorskip("numba")

from interpreted_kernel import InterpreterBackend, why_not

NO_RESERVE = 0x4000  # of Linux; Python names it from 3.12 on
ROWS, SIZE = 200, 64
#: As far as a tile of 128 rows allows, since offsets within a tile have 32 bits.
APART = 2**24 - 8
#: An offset that leaves 32 bits comes round to here, where nothing is, instead of to a fault.
BEFORE = 2**31


@pytest.fixture
def far():
    """Make a copy of ``[1, 1, L, D]`` with rows far apart."""
    kept = []

    def make(x):
        elements = BEFORE + len(x[0, 0]) * APART
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
        memory = mmap.mmap(-1, elements * 2, flags=flags)
        kept.append(memory)
        flat = torch.frombuffer(memory, dtype=x.dtype)
        view = flat.as_strided(x.shape, (0, 0, APART, 1), BEFORE)
        view.copy_(x)
        return view

    return make


def backends():
    yield pytest.param(CpuBackend, id="cpu")
    skip = pytest.mark.skipif(bool(why_not()), reason=why_not() or "")
    for way in (Method(), Method(True, "fp16"), Method(True, "e4m3")):
        name = f"kernel-{way.name or 'native'}"
        yield pytest.param(lambda way=way: InterpreterBackend(way), id=name, marks=skip)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is only promised")
@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("ordered", [False, True])
def test_offsets_have_64_bits(backend, ordered, far):
    q, k, v = torch.randn(3, 1, 1, ROWS, SIZE).half()
    order = torch.arange(ROWS).flip(0) if ordered else None
    near, away = (
        backend().forward(Inputs(*tensors, 0.125, order), None, "mass")
        for tensors in ((q, k, v), (far(q), far(k), far(v)))
    )
    for one, other in zip(near, away, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
