"""What a call of the kernels takes, and what it refuses before anything is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_liteattention.backends.base import Inputs, Skipped
from comfyui_liteattention.backends.gpu import launches
from comfyui_liteattention.backends.gpu.kernel_table import TILE
from comfyui_liteattention.backends.pooled import pool
from comfyui_liteattention.tiles import TileLists, all_live, make_lists

#: There is no card here.
ON_CPU = replace(launches.CONSTRAINTS, device="cpu")


def draw(b=1, h=2, lq=200, lk=330, d=64, dtype=torch.float16):
    return tuple(torch.randn(b, length, h, d).to(dtype).transpose(1, 2) for length in (lq, lk, lk))


@pytest.mark.parametrize("tokens_first", [False, True])
def test_out_has_the_layout_of_q(tokens_first):
    q, k, _ = (x if tokens_first else x.contiguous() for x in draw())
    out = launches.allocate(q, k, False, None).out
    assert out.stride() == q.stride()


def test_lists_that_do_not_fit_are_refused():
    q, k, v = draw()
    lists = make_lists(torch.ones(1, 2, *TILE.grid(200, 330), dtype=torch.bool))
    with pytest.raises(ValueError, match="don't fit"):
        launches.prepare(Inputs(q, k, v, 1.0), TileLists(lists.count, lists.index[..., 1:]), None)
    with pytest.raises(ValueError, match="int32"):
        launches.prepare(Inputs(q, k, v, 1.0), TileLists(lists.count, lists.index.long()), None)


def change(q, k, v, case):
    if case == "dtype":
        return q.float(), k.float(), v.float()
    if case == "mixed":
        return q, k.bfloat16(), v
    if case == "head_dim 72":
        return draw(d=72)
    if case == "don't match":
        return q, k[:, :1], v[:, :1]
    if case == "empty":
        return q, k[:, :, :0], v[:, :, :0]
    if case == "contiguous along":
        return q, k.transpose(2, 3).contiguous().transpose(2, 3), v
    if case == "multiples of 8":
        return q, torch.zeros(1, 2, 330, 68, dtype=q.dtype)[..., :64], v
    if case == "16 bytes":
        return torch.zeros(1, 2, 200, 72, dtype=q.dtype)[..., 4:68], k, v
    if case == "gradients":
        return q.requires_grad_(), k, v
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        *("dtype", "mixed", "head_dim 72", "don't match", "empty", "contiguous along"),
        *("multiples of 8", "16 bytes", "gradients"),
    ],
)
def test_what_the_kernel_cannot_take_has_a_reason(case):
    assert ON_CPU.check(*draw()) is None
    assert case in ON_CPU.check(*change(*draw(), case))


def test_rows_too_far_apart_for_32_bits_have_a_reason():
    meta = replace(launches.CONSTRAINTS, device="meta")
    q, k, v = (x.to("meta") for x in draw())
    k = torch.empty_strided(k.shape, (2**40, 64, 2**25, 1), dtype=k.dtype, device="meta")
    assert "too far" in meta.check(q, k, v)


def test_strides_of_single_rows_do_not_matter():
    q, k, v = draw(b=1, lq=1)
    odd = q.as_strided(q.shape, (3, q.stride(1), 5, 1))
    assert ON_CPU.check(odd, k, v) is None


@pytest.mark.parametrize("wrong", [None, "bits", "means", "full", "no audited"])
def test_an_audit_that_does_not_fit_is_refused(wrong):
    """The kernel would read past the end."""
    q, k, v = draw()
    kept = launches.allocate(q, k, True, None)
    full = launches.allocate(q[:, :, 128 : 200 - (wrong == "full")], k, True, None)
    live = all_live(1, 2, 2 + (wrong == "bits"), 6)
    pooled = pool(k, v, TILE.k // 2 if wrong == "means" else TILE.k)
    audited = range(1, 1 if wrong == "no audited" else 2)
    arguments = (kept, Skipped(q, pooled, 0.125, live), full, audited)
    if wrong is None:
        launch, sums = launches.prepare_audit(*arguments)
        assert launch.grid == (1, 2) and sums.shape == (1, 2, 1, 2)
    else:
        with pytest.raises(ValueError, match=r"don't fit|isn't the result"):
            launches.prepare_audit(*arguments)
