"""The kernel that adds what skipped tiles contribute, in the interpreter, against its twin."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton isn't installed, so there is no kernel to interpret")

from interpreted_kernel import InterpreterBackend, interpret, why_not

from comfyui_liteattention.backends.base import Inputs, Skipped, rows_of
from comfyui_liteattention.backends.gpu.kernel_table import TILE
from comfyui_liteattention.backends.gpu.launches import prepare_skipped
from comfyui_liteattention.backends.pooled import Pooled, add_skipped, audit_skipped, pool
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import make_lists, pack
from comfyui_liteattention.token_order import take

KERNEL = InterpreterBackend()

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# The interpreter warns of the logarithm of 0, which means that nothing was skipped.
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:divide by zero")]


def draw(dtype, length, heads, head_dim, sharpness=1.0):
    """q, k, v with tokens first, as models have them, and tiles that are live."""
    g = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(1, length, heads, head_dim, generator=g).to(dtype).transpose(1, 2)
        for _ in range(3)
    )
    live = torch.rand(1, heads, *TILE.grid(length, length), generator=g) < 0.5
    live[..., 0] = True
    live[0, 0, 0] = True  # a query tile that skips nothing
    return q * sharpness, k, v, live


def kept_part(q, k, v, live, scale):
    """What the attention kernel leaves, exact but for the rounding of the output."""
    lists = make_lists(live)
    kept = ReferenceBackend(TILE).forward(Inputs(q.double(), k.double(), v.double(), scale), lists)
    out = kept.out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return kept._replace(out=out, lse=kept.lse.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "head_dim", "sharpness"),
    [(300, 64, 1.0), (300, 64, 8.0), (700, 128, 1.0), (200, 96, 1.0)],
)
def test_it_matches_its_twin(dtype, length, head_dim, sharpness):
    q, k, v, live = draw(dtype, length, 2, head_dim, sharpness)
    scale = head_dim**-0.5
    kept, pooled = kept_part(q, k, v, live, scale), pool(k, v, TILE.k)
    factor = torch.tensor([[1.7, 0.4]])
    wide = Pooled(pooled.keys.double(), pooled.values.double(), pooled.length, pooled.rows)
    want = kept._replace(out=kept.out.double())
    add_skipped(want, Skipped(q.double(), wide, scale, pack(live)), factor, TILE)
    before = kept.out.clone()
    interpret(prepare_skipped(kept, Skipped(q, pooled, scale, pack(live)), factor))
    error = (kept.out.double() - want.out).norm() / want.out.norm()
    rounding = (want.out.to(dtype).double() - want.out).norm() / want.out.norm()
    assert error <= 2 * rounding
    assert torch.equal(kept.out[0, 0, : TILE.q], before[0, 0, : TILE.q])
    # Next to peaks as sharp as 8 times that, means are less than the rounding.
    assert torch.equal(kept.out[0, 1], before[0, 1]) is (sharpness == 8 and dtype == torch.bfloat16)


@pytest.mark.parametrize("length", [300, 700])
def test_an_order_of_queries_changes_nothing_else(length):
    q, k, v, live = draw(torch.bfloat16, length, 2, 64)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    kept, pooled, factor = kept_part(q, k, v, live, 0.125), pool(k, v, TILE.k), torch.ones(1, 2)
    listed = kept._replace(out=take(kept.out, order), lse=kept.lse[:, :, order].contiguous())
    interpret(prepare_skipped(listed, Skipped(take(q, order), pooled, 0.125, pack(live)), factor))
    interpret(prepare_skipped(kept, Skipped(q, pooled, 0.125, pack(live), order), factor))
    assert torch.equal(take(kept.out, order), listed.out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "head_dim", "sharpness", "audited"),
    [
        (300, 64, 1.0, range(0, 1)),
        (300, 64, 8.0, range(1, 3)),  # the last query tile has fewer rows
        (700, 128, 0.0, range(4, 6)),
        (200, 96, 1.0, range(0, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("ordered", [False, True])
def test_an_audit_matches_its_twin(dtype, length, head_dim, sharpness, audited, ordered):
    q, k, v, live = draw(dtype, length, 2, head_dim, sharpness)
    scale, pooled = head_dim**-0.5, pool(k, v, TILE.k)
    random = torch.Generator().manual_seed(2)
    order = torch.randperm(length, generator=random) if ordered else None
    truth = ReferenceBackend(TILE)
    wide = (q.double(), k.double(), v.double())
    kept = truth.forward(Inputs(*wide, scale, order), make_lists(live), None)
    full = truth.forward(Inputs(wide[0][:, :, rows_of(audited, TILE, order)], *wide[1:], scale))
    kept, full = (x._replace(out=x.out.to(dtype), lse=x.lse.float()) for x in (kept, full))
    case = (kept, Skipped(q, pooled, scale, pack(live), order), full, audited)
    want = audit_skipped(*case, TILE)
    got = KERNEL.audit_skipped(*case)
    for ours, theirs in zip(got, want, strict=True):
        assert (ours - theirs).abs().max() <= 0.01 * theirs.abs().max()
    again = KERNEL.audit_skipped(*case)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_an_audit_of_a_tile_that_skips_nothing_sees_nothing():
    q, k, v, live = draw(torch.bfloat16, 300, 2, 64)
    live = torch.ones_like(live)
    full = kept_part(q, k, v, live, 0.125)
    skipped = Skipped(q, pool(k, v, TILE.k), 0.125, pack(live))
    assert all((x == 0).all() for x in KERNEL.audit_skipped(full, skipped, full, range(3)))


@pytest.mark.parametrize("case", ["nothing skipped", "a factor of 0"])
def test_nothing_to_add_changes_no_bit(case):
    q, k, v, live = draw(torch.bfloat16, 300, 1, 64)
    live = torch.ones_like(live) if case == "nothing skipped" else live
    factor = torch.full((1, 1), 0.0 if case == "a factor of 0" else 1.0)
    kept = kept_part(q, k, v, live, 0.125)
    before = kept.out.clone()
    interpret(prepare_skipped(kept, Skipped(q, pool(k, v, TILE.k), 0.125, pack(live)), factor))
    assert torch.equal(kept.out, before)


def test_maps_of_another_shape_are_refused():
    q, k, v, live = draw(torch.float16, 300, 1, 64)
    kept = kept_part(q, k, v, live, 0.125)
    with pytest.raises(ValueError, match="don't fit"):
        prepare_skipped(
            kept, Skipped(q, pool(k, v, TILE.k), 0.125, pack(live)[:, :, :1]), torch.ones(1, 1)
        )
