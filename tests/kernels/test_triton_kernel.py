"""The kernel's numbers, in the Triton interpreter, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("triton", reason="triton isn't installed, so there is no kernel to interpret")

from interpreted_kernel import InterpreterBackend, why_not
from running_scores import running_scores

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.gpu.kernel_table import HEAD_DIMS, TILE
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import TileLists, make_lists
from comfyui_liteattention.token_order import take

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

KERNEL, TRUTH = InterpreterBackend(), ReferenceBackend(TILE)
DTYPES = (torch.float16, torch.bfloat16)
SCORE_ERROR = 0.05  # log2


def draw(b=1, h=2, lq=200, lk=330, d=64, dtype=torch.float16, seed=0) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(b, h, length, d, generator=random).to(dtype) for length in (lq, lk, lk)
    )


def draw_mask(q: Tensor, k: Tensor, kept=0.5, seed=0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(*q.shape[:2], *TILE.grid(q.shape[2], k.shape[2]), generator=random) < kept
    mask[..., 1 % mask.shape[-1]] = True
    return mask


def truth(q, k, v, scale, lists, criterion=None):
    return TRUTH.forward(Inputs(q.double(), k.double(), v.double(), scale), lists, criterion)


def relative_error(out: Tensor, want: Tensor) -> float:
    return ((out.double() - want).norm() / want.norm()).item()


def plain_error(q, k, v, scale, mask, want) -> float:
    """Relative error of PyTorch's own attention in the inputs' dtype."""
    tokens = None
    if mask is not None:
        tokens = mask.repeat_interleave(TILE.q, 2).repeat_interleave(TILE.k, 3)
        tokens = tokens[..., : q.shape[2], : k.shape[2]]
    return relative_error(scaled_dot_product_attention(q, k, v, tokens, scale=scale), want)


def check(q, k, v, mask=None, scale=None, criterion="mass", atol=1e-5):
    """One call against the truth: output, LSE and scores. Returns the kernel's result."""
    scale = scale if scale is not None else q.shape[-1] ** -0.5
    lists = None if mask is None else make_lists(mask)
    got = KERNEL.forward(Inputs(q, k, v, scale), lists, criterion)
    want = truth(q, k, v, scale, lists, criterion)
    allowed = 2 * plain_error(q, k, v, scale, mask, want.out)
    assert relative_error(got.out, want.out) <= allowed + 1e-7
    assert torch.allclose(got.lse, want.lse, rtol=1e-5, atol=atol)
    everything = make_lists(torch.ones(want.score.shape, dtype=torch.bool))
    twin = running_scores(q, k, scale, lists or everything, TILE, criterion)
    visited = twin > -math.inf
    assert torch.equal(visited, got.score > -math.inf) or (twin[visited] < -100).any()
    close = (got.score.double() - twin).abs() <= SCORE_ERROR
    # Beyond float32's exponents a share is 0: as negligible as can be.
    assert (close | ~visited | ((twin < -100) & (got.score < -100))).all()
    assert (got.score >= want.score - SCORE_ERROR)[visited & (twin > -100)].all()
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 96])
@pytest.mark.parametrize("listed", [False, True])
def test_an_order_of_queries_changes_nothing_else(dtype, d, listed):
    """Row r of the map is the query order[r]; outputs stay in the order of the queries."""
    q, k, v = (
        x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw(lq=300, d=d, dtype=dtype)
    )
    lists = make_lists(draw_mask(q, k)) if listed else None
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    want = KERNEL.forward(Inputs(take(q, order), k, v, 0.1), lists, "mass")
    got = KERNEL.forward(Inputs(q, k, v, 0.1, order), lists, "mass")
    assert torch.equal(take(got.out, order), want.out)
    assert torch.equal(got.lse[:, :, order], want.lse) and torch.equal(got.score, want.score)


def test_an_order_that_does_not_fit_is_refused():
    q, k, v = draw(h=1)
    for order in (torch.arange(199), torch.arange(200, dtype=torch.int32)):
        with pytest.raises(ValueError, match="order"):
            KERNEL.forward(Inputs(q, k, v, 0.1, order))


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skips", [False, True], ids=["dense", "lists"])
def test_matches_the_truth(dtype, d, skips):
    q, k, v = draw(d=d, dtype=dtype)
    check(q, k, v, draw_mask(q, k) if skips else None)


@pytest.mark.parametrize("criterion", ["mass", "gap"])
def test_both_criteria(criterion):
    q, k, v = draw(lq=300, dtype=torch.bfloat16)
    check(3 * q, k, v, draw_mask(q, k, 0.7), criterion=criterion)


@pytest.mark.parametrize(
    ("lq", "lk"), [(1, 1), (1, 200), (127, 63), (128, 64), (129, 65), (257, 1), (64, 321)]
)
def test_ragged_ends(lq, lk):
    check(*draw(h=1, lq=lq, lk=lk, seed=lq))


def test_nothing_beyond_the_ends_is_used():
    q, k, v = draw(h=1, lq=130, lk=70)
    inside = []
    for tensor in (q, k, v):
        bigger = torch.full((1, 1, 512, 64), math.nan, dtype=tensor.dtype)
        bigger[:, :, : tensor.shape[2]] = tensor
        inside.append(bigger[:, :, : tensor.shape[2]])
    assert torch.equal(
        KERNEL.forward(Inputs(*inside, 0.125)).out, KERNEL.forward(Inputs(q, k, v, 0.125)).out
    )


def test_layouts_need_no_copy():
    """Heads inside the tokens, a fused projection, a slice of wider rows: bit for bit the same."""
    b, h, length, d = 2, 2, 140, 64
    fused = torch.randn(b, length, 3, h, d).to(torch.bfloat16)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    wide = torch.zeros(b, h, length, d + 8, dtype=torch.bfloat16)
    wide[..., :d] = k
    want = KERNEL.forward(Inputs(*(x.contiguous() for x in (q, k, v)), 0.1))
    got = KERNEL.forward(Inputs(q, wide[..., :d], v, 0.1))
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
    assert got.out.transpose(1, 2).is_contiguous(), "out keeps the queries' layout"


def test_batch_and_heads_have_their_own_lists():
    q, k, v = draw(b=2, h=3, lq=130, lk=200)
    check(q, k, v, draw_mask(q, k, 0.4))


@pytest.mark.parametrize("criterion", [None, "mass", "gap"])
def test_naming_every_tile_is_dense_bit_for_bit(criterion):
    q, k, v = draw(dtype=torch.bfloat16)
    everything = make_lists(torch.ones(1, 2, *TILE.grid(200, 330), dtype=torch.bool))
    dense = KERNEL.forward(Inputs(q, k, v, 0.125))
    got = KERNEL.forward(Inputs(q, k, v, 0.125), everything, criterion)
    assert torch.equal(got.out, dense.out) and torch.equal(got.lse, dense.lse)


def test_one_tile():
    q, k, v = draw(h=1)
    mask = torch.zeros(1, 1, *TILE.grid(200, 330), dtype=torch.bool)
    mask[0, 0, 0, 5] = mask[0, 0, 1, 2] = True  # the ragged one, and a full one
    got = check(q, k, v, mask)
    assert got.score.max() == 0 and got.score.isfinite().sum() == 2


def test_empty_list_is_an_empty_softmax():
    q, k, v = draw(h=1)
    mask = torch.ones(1, 1, *TILE.grid(200, 330), dtype=torch.bool)
    mask[:, :, 0] = False
    got = KERNEL.forward(Inputs(q, k, v, 0.125), make_lists(mask), "mass")
    assert (got.out[:, :, :128] == 0).all() and (got.lse[:, :, :128] == -math.inf).all()
    assert got.out[:, :, 128:].isfinite().all()
    assert (got.score[:, :, 0] == -math.inf).all()


def test_padding_of_the_lists_is_never_used():
    q, k, v = draw(h=1)
    lists = make_lists(draw_mask(q, k))
    want = KERNEL.forward(Inputs(q, k, v, 0.125), lists, "gap")
    places = torch.arange(lists.index.shape[-1])
    garbage = torch.where(places < lists.count.unsqueeze(-1), lists.index, 2**30)
    got = KERNEL.forward(Inputs(q, k, v, 0.125), TileLists(lists.count, garbage), "gap")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_visiting_order_is_the_lists():
    """Another order: the same output up to rounding, scores against another running sum."""
    q, k, v = draw(h=1, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, *TILE.grid(200, 330), dtype=torch.bool)
    forth = make_lists(mask)
    back = TileLists(forth.count, forth.index.flip(-1).contiguous())
    a, b = (KERNEL.forward(Inputs(q, k, v, 0.125), x, "mass") for x in (forth, back))
    assert relative_error(b.out, a.out.double()) < 4e-3
    assert (a.score[..., 0] == 0).all() and (b.score[..., -1] == 0).all()
    for lists, got in ((forth, a), (back, b)):
        twin = running_scores(q, k, 0.125, lists, TILE, "mass")
        assert (got.score - twin).abs().max() < SCORE_ERROR


@pytest.mark.parametrize("criterion", ["mass", "gap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_really_drop(dtype, criterion):
    """Two calls: what the first marks, the second skips, and little is lost."""
    q, k, v = draw(h=2, lq=256, lk=650, dtype=dtype)
    fading = 3 * 0.6 ** torch.arange(11)
    k = (k * fading.repeat_interleave(TILE.k)[:650, None]).to(dtype)
    first = check(q, k, v, criterion=criterion, scale=0.3)
    live = first.score > -5
    assert 0.2 < live.float().mean() < 0.9
    second = check(q, k, v, live, criterion=criterion, scale=0.3)
    lost = -torch.expm1(second.lse - first.lse)
    assert lost.max() < 0.2 and lost.mean() > 0


@pytest.mark.parametrize("criterion", ["mass", "gap"])
@pytest.mark.parametrize("case", ["huge", "tiny", "equal", "spike", "far below zero"])
def test_adversarial_scores(case, criterion):
    q, k, v = draw(h=1, lq=130, lk=300, dtype=torch.bfloat16)
    if case == "huge":
        q, k = 30 * q, 30 * k
    if case == "tiny":
        q = 1e-6 * q
    if case == "equal":
        k = torch.zeros_like(k)
    if case == "spike":
        k[:, :, 250] = 40 * q[:, :, 3]
    if case == "far below zero":  # a padded key of score 0 would be the maximum
        q, k = q.abs() * 20, -k.abs() * 20
    got = check(q, k, v, draw_mask(q, k, 0.8), criterion=criterion, atol=2e-2)
    assert got.out.isfinite().all() and got.lse.isfinite().all()


def test_scale_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        KERNEL.forward(Inputs(*draw(h=1), 0.0))
