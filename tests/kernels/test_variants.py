"""The table of kernels."""

from __future__ import annotations

import pickle

from comfyui_liteattention.backends.gpu.kernel_table import (
    ARCHS,
    CONFIGS,
    HEAD_DIMS,
    KERNELS,
    MAP_KERNELS,
    VARIANTS,
    Variant,
    divisor,
)


def test_every_architecture_has_every_head_dim():
    for configs in CONFIGS.values():
        assert all(tuple(by_head_dim) == HEAD_DIMS for by_head_dim in configs.values())
        assert set(configs) <= set(ARCHS)
    assert len({k.name for k in KERNELS}) == len(KERNELS) > len(VARIANTS)
    assert Variant(96, "fp16", True, "gap").constants()["PADDED_DIM"] == 128


def test_kernels_are_the_same_in_another_process():
    for kernel in KERNELS:
        copy = pickle.loads(pickle.dumps(kernel))
        assert copy == kernel and copy.constants() == kernel.constants()


def test_what_is_taken_for_granted_about_arguments():
    native, int8 = (Variant(64, "bf16", True, "mass", qk) for qk in ("native", "int8"))
    assert [divisor(native, f"{x}_row", "i32") for x in ("q", "v")] == [8, 8]
    assert [divisor(int8, f"{x}_row", "i32") for x in ("q", "k", "v", "out")] == [16, 16, 8, 8]
    assert divisor(int8, "q_unit", "*fp32") == 16 and divisor(int8, "lq", "i32") == 1
    assert all(divisor(kernel, "threshold", "*fp32") == 1 for kernel in MAP_KERNELS)
