"""The table of kernels."""

from __future__ import annotations

import pickle
from itertools import product

import pytest
import torch

from comfyui_liteattention.backends.gpu.kernel_table import (
    ARCHS,
    CONFIGS,
    DTYPES,
    HEAD_DIMS,
    KERNELS,
    LARGEST_E4M3,
    LIFT,
    MAP_KERNELS,
    METHODS,
    TILE,
    TOP,
    VARIANTS,
    Method,
    Variant,
    divisor,
    method,
)


def test_every_card_has_a_method_for_every_head_dim():
    for arch, head_dim, dtype in product(ARCHS, HEAD_DIMS, DTYPES):
        assert method("native", arch, head_dim, dtype) in CONFIGS
    for mode, by_arch in METHODS.items():
        for arch, head_dim in product(by_arch, (64, 128)):
            found = method(mode, arch, head_dim, "bf16")
            assert found is not None and found.int8 == (mode != "native")
            assert Variant(head_dim, "bf16", True, "mass", found).config(arch) is not None
    assert len({k.name for k in KERNELS}) == len(KERNELS) > len(VARIANTS)
    assert Variant(96, "fp16", True, "gap").constants()["PADDED_DIM"] == 128


def test_models_in_fp16_keep_float32_sums():
    assert method("native", 89, 128, "fp16") == Method()
    assert method("native", 89, 128, "bf16") == Method(values="fp16")
    assert method("int8", 89, 128, "fp16") == Method(True, "fp16")
    assert method("int8", 89, 96, "bf16") is None and method("fp8", 86, 128, "bf16") is None


@pytest.mark.parametrize("values", ["fp16", "e4m3"])
def test_no_sum_of_a_tile_can_overflow(values):
    """A rounding may double p in fp16; e4m3 ends at 448."""
    p = 2 * 2 ** LIFT[values] if values == "fp16" else torch.finfo(torch.float8_e4m3fn).max
    v = 2**TOP if values == "fp16" else LARGEST_E4M3
    largest = v * (1 - 2**-11) if values == "fp16" else v
    assert TILE.k * p * largest <= torch.finfo(torch.float16).max


def test_kernels_are_the_same_in_another_process():
    for kernel in KERNELS:
        copy = pickle.loads(pickle.dumps(kernel))
        assert copy == kernel and copy.constants() == kernel.constants()
        assert copy.types == kernel.types
        assert [copy.config(arch) for arch in ARCHS] == [kernel.config(arch) for arch in ARCHS]
        for name, type_ in kernel.entry.parameters:
            assert divisor(copy, name, type_) == divisor(kernel, name, type_)


def test_what_is_taken_for_granted_about_arguments():
    native, int8, fp8 = (
        Variant(64, "bf16", True, "mass", m)
        for m in (Method(), Method(True, "fp16"), Method(True, "e4m3"))
    )
    assert [divisor(native, f"{x}_row", "i32") for x in ("q", "v")] == [8, 8]
    assert [divisor(int8, f"{x}_row", "i32") for x in ("q", "k", "v", "out")] == [16, 16, 8, 8]
    assert [divisor(fp8, f"{x}_row", "i32") for x in ("q", "k", "v", "out")] == [16, 16, 16, 8]
    assert divisor(int8, "q_unit", "*fp32") == 16 and divisor(int8, "lq", "i32") == 1
    assert all(divisor(kernel, "threshold", "*fp32") == 1 for kernel in MAP_KERNELS)
