"""The faster modes: kernels in the interpreter against their twin, the twin against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.gpu import qk_int8, scaled_values
from comfyui_liteattention.backends.gpu.kernel_table import CONFIGS, HEAD_DIMS, TILE, TOP, Method
from comfyui_liteattention.backends.gpu.low_precision import LowPrecisionReference
from comfyui_liteattention.backends.gpu.narrow import narrow
from comfyui_liteattention.backends.gpu.scaled_values import scale_values
from comfyui_liteattention.backends.pooled import pool
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.backends.tile_map import mark
from comfyui_liteattention.policy import lost_mass
from comfyui_liteattention.tiles import make_lists

pytest.importorskip("triton", reason="triton isn't installed, so there is no kernel to interpret")

from interpreted_kernel import InterpreterBackend, interpret, why_not
from running_scores import running_scores

interpreted = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

TRUTH = ReferenceBackend(TILE)
DTYPES = (torch.float16, torch.bfloat16)
FP16, INT8 = Method(values="fp16"), Method(int8=True)
METHODS = [method for method in CONFIGS if method.name]
each_method = pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])
in_8_bits = pytest.mark.parametrize(
    "method", [m for m in METHODS if m.int8], ids=[m.name for m in METHODS if m.int8]
)
KERNELS = {method: InterpreterBackend(method) for method in METHODS}
TWINS = {method: LowPrecisionReference(method, TILE) for method in METHODS}
#: Of the weights p, and what that does to a result beside the error of plain attention.
ROUNDING = {"own": 5e-4, "fp16": 1e-3, "e4m3": 0.04}


def draw(b=1, h=2, lq=200, lk=330, d=64, dtype=torch.bfloat16, common=2.0, seed=0):
    """Keys that have ``common`` times their own size in common."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(b, length, h, d, generator=random).transpose(1, 2) for length in (lq, lk, lk)
    )
    k = k + common * torch.randn(b, h, 1, d, generator=random)
    return tuple(x.to(dtype) for x in (q, k, v))


def draw_mask(q: Tensor, k: Tensor, kept=0.5) -> Tensor:
    random = torch.Generator().manual_seed(1)
    mask = torch.rand(*q.shape[:2], *TILE.grid(q.shape[2], k.shape[2]), generator=random) < kept
    mask[..., 1 % mask.shape[-1]] = True
    return mask


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def doubled(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.double() for x in tensors)


def check(method, q, k, v, mask=None, criterion="mass", atol=2e-3):
    """The kernels against the twin: whatever differs beyond rounding is a fault of theirs."""
    scale = q.shape[-1] ** -0.5
    lists = None if mask is None else make_lists(mask)
    got = KERNELS[method].forward(Inputs(q, k, v, scale), lists, criterion)
    # The very tensors, so that the means are the same to the bit: rounding is a matter of those.
    want = TWINS[method].forward(Inputs(q, k, v, scale), lists, criterion)
    plain = relative_error(scaled_dot_product_attention(q, k, v, scale=scale), dense_truth(q, k, v))
    assert relative_error(got.out, want.out) <= 2 * plain + ROUNDING[method.values]
    # Float32 has 24 bits of the largest score, which the keys' mean can take away again.
    atol = max(atol, 2**-20 * want.lse.abs().max().item())
    assert torch.allclose(got.lse, want.lse, rtol=1e-5, atol=atol)
    visited = want.score > -100
    assert (got.score >= want.score - 0.05)[visited].all() and (got.score <= 0).all()
    assert not (got.score > -math.inf)[want.score == -math.inf].any()
    return got


def dense_truth(q, k, v) -> Tensor:
    return TRUTH.forward(Inputs(*doubled(q, k, v), q.shape[-1] ** -0.5)).out


# ---- the kernels --------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantising_matches_its_twin(d, dtype):
    q, k, v = draw(b=2, d=d, dtype=dtype)
    order = torch.randperm(330)
    made = narrow(Inputs(q, k, v, 0.2), order, INT8, TILE, means=True)
    for launch in made.launches:
        interpret(launch)
    mean, listed = qk_int8.mean_key(k), k[:, :, order]
    queries = qk_int8.quantise_queries(q, mean, 0.2)
    keys = qk_int8.quantise_keys(listed, mean, TILE.k)
    (q8, k8, v8, q_unit, k_unit, shift, _), pooled, _ = made
    assert torch.equal(v8, v[:, :, order])
    check_means(pooled, pool(listed, v8, TILE.k))
    for got, want in ((q8, queries.values), (k8, keys.values)):
        steps = (got.int() - want.int()).abs()  # sums in another order may round to the next
        assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3 and want.abs().max() == 127
    for got, want in ((q_unit, queries.unit), (k_unit, keys.unit)):
        assert torch.allclose(got, want, rtol=1e-5, atol=0)
    assert torch.allclose(shift, queries.shift, rtol=1e-4, atol=1e-4)


def check_means(got, want):
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) < 1e-3  # another last bit here and there
    assert got[2:] == want[2:]


def draw_values(dtype: torch.dtype) -> Tensor:
    """``[1, 2, 150, 96]``: channels of all sizes, one of them zero, one with a number of each size
    that there is."""
    v = draw(lq=1, lk=150, d=96, dtype=torch.float32)[2]
    v *= torch.logspace(-6, 4, 96)
    v[..., 7] = 0
    v[..., 9] *= torch.logspace(-9, 0, 150).unsqueeze(0)
    return v.to(dtype)


@interpreted
@pytest.mark.parametrize("values", ["fp16", "e4m3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling_matches_its_twin(values, dtype):
    v = draw_values(dtype)
    order = torch.randperm(150)
    made = narrow(Inputs(v, v, v, 0.2), order, Method(values=values), TILE, means=True)
    for launch in made.launches:
        interpret(launch)
    listed = v[:, :, order]
    want, got = scale_values(listed, values, TILE.k), made.narrowed
    bits = torch.uint8 if values == "e4m3" else torch.int16
    assert torch.equal(got.v.view(bits), want.values.view(bits))
    assert torch.allclose(got.v_unit, want.unit, rtol=1e-6, atol=0)
    assert torch.equal(got.k, listed)
    check_means(made.pooled, pool(listed, listed, TILE.k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp16_holds_all_that_matters_of_a_value(dtype):
    """Nothing is rounded but what is far below the largest of its channel."""
    v = draw_values(dtype)
    scaled = scale_values(v, "fp16", TILE.k)
    back = scaled_values.restored(scaled, 150)
    assert scaled.values.abs().max() < 2**TOP
    peak = v.float().abs().amax(2, keepdim=True)
    assert ((back - v.float()).abs() <= peak * 2.0**-24).all()
    large = v.float().abs() > peak * 2.0**-7
    assert torch.equal(back[large], v.float()[large])


@interpreted
@each_method
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("skips", [False, True], ids=["dense", "lists"])
def test_attention_matches_its_twin(method, d, dtype, skips):
    if method.int8 and d == 96:
        pytest.skip("a rotation takes powers of two")
    q, k, v = draw(d=d, dtype=dtype)
    check(method, q, k, v, draw_mask(q, k) if skips else None)


@interpreted
@each_method
@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (127, 63), (129, 65), (64, 321)])
def test_ragged_ends(method, lq, lk):
    check(method, *draw(h=1, lq=lq, lk=lk))


@interpreted
@each_method
@pytest.mark.parametrize("criterion", [None, "mass", "gap"])
def test_naming_every_tile_is_dense_bit_for_bit(method, criterion):
    call = Inputs(*draw(), 0.125)
    everything = make_lists(torch.ones(1, 2, *TILE.grid(200, 330), dtype=torch.bool))
    dense = KERNELS[method].forward(call)
    got = KERNELS[method].forward(call, everything, criterion)
    assert torch.equal(got.out, dense.out) and torch.equal(got.lse, dense.lse)


@interpreted
@each_method
def test_layouts_need_no_copy(method):
    call = Inputs(*draw(), 0.125)
    packed = call._replace(q=call.q.contiguous(), k=call.k.contiguous(), v=call.v.contiguous())
    want = KERNELS[method].forward(packed, None, "mass")
    got = KERNELS[method].forward(call, None, "mass")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@interpreted
@each_method
@pytest.mark.parametrize(
    "case",
    [
        *("huge", "tiny", "equal keys", "spike", "far below zero", "an outlying channel"),
        *("huge values", "tiny values"),
    ],
)
def test_adversarial_inputs(method, case):
    q, k, v = draw(h=1, lq=130, lk=300)
    if case == "huge":
        q, k = 30 * q, 30 * k
    if case == "tiny":
        q = 1e-6 * q
    if case == "equal keys":
        k = torch.ones_like(k)
    if case == "spike":
        k[:, :, 250] = 40 * q[:, :, 3]
    if case == "far below zero":
        q, k = q.abs() * 20, -k.abs() * 20
    if case == "an outlying channel":
        q[..., 5], k[..., 5] = 30 * q[..., 5], 30 * k[..., 5]
    if case == "huge values":
        v = v.abs() * 1e30  # all of one sign: the largest sums that there are
    if case == "tiny values":
        v = v * 1e-30
    got = check(method, q, k, v, draw_mask(q, k, 0.8))
    assert got.out.isfinite().all() and got.lse.isfinite().all()


@interpreted
@pytest.mark.parametrize("values", ["fp16", "e4m3"])
def test_no_sum_overflows(values):
    """Equal weights and values are the largest sums; scores so large that rounding shows in p."""
    q = torch.full((1, 1, 8, 64), 300.0, dtype=torch.bfloat16)
    v = torch.full((1, 1, 128, 64), 3.0e38, dtype=torch.bfloat16)
    k = q[:, :, :1].expand(v.shape).contiguous()
    got = InterpreterBackend(Method(values=values)).forward(Inputs(q, k, v, 1.7))
    assert torch.allclose(got.out.double(), v[:, :, :8].double(), rtol=0.01)


@interpreted
def test_the_largest_sums_are_exact():
    """127 * 127 * 128, either sign: the integers of the kernel's shortcut to float32. The rotation
    makes one channel of keys that are equal but for their sign."""
    method = INT8
    q, k, v = (torch.ones(1, 1, length, 128, dtype=torch.float16) for length in (4, 128, 128))
    k[:, :, ::2] = -1
    q[:, :, 0] = -1
    v[:, :, ::2] = 0
    got = KERNELS[method].forward(Inputs(q, k, v, 0.01))
    want = TRUTH.forward(Inputs(*doubled(q, k, v), 0.01))
    assert torch.allclose(got.out.double(), want.out, rtol=1e-3)
    assert torch.allclose(got.lse, want.lse, rtol=1e-6)


@interpreted
@in_8_bits
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_what_is_not_finite_comes_out_as_such(method, where, value):
    """8 bits have no such values; a run must see that something is wrong all the same."""
    q, k, v = draw(h=1)
    (q if where == "q" else k)[0, 0, 17, 3] = value
    out = KERNELS[method].forward(Inputs(q, k, v, 0.125)).out
    assert out[0, 0, 17].isnan().all()
    if where == "q":
        assert out[0, 0, :17].isfinite().all() and out[0, 0, 18:].isfinite().all()


@interpreted
@each_method
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_comes_out_as_such(method, value):
    q, k, v = draw(h=1)
    v[0, 0, 17, 3] = value
    out = KERNELS[method].forward(Inputs(q, k, v, 0.125)).out
    assert not out[..., 3].isfinite().any() and out[..., :3].isfinite().all()


@interpreted
@each_method
def test_an_audit_compares_like_with_like(method):
    """Some rows in full, as the audit computes them: the very rows of the whole call, and the
    sparse call's LSE lies below by the lost mass."""
    q, k, v = draw(lq=384)
    mask = draw_mask(q, k, 0.6)
    rows = slice(128, 256)
    dense = KERNELS[method].forward(Inputs(q, k, v, 0.125))
    audit = KERNELS[method].forward(Inputs(q[:, :, rows], k, v, 0.125))
    assert torch.equal(audit.out, dense.out[:, :, rows])
    assert torch.equal(audit.lse, dense.lse[:, :, rows])
    sparse = KERNELS[method].forward(Inputs(q, k, v, 0.125), make_lists(mask))
    got = lost_mass(sparse.lse[:, :, rows], audit.lse)
    truth, truth_sparse = (
        TRUTH.forward(Inputs(*doubled(q, k, v), 0.125), lists) for lists in (None, make_lists(mask))
    )
    want = lost_mass(truth_sparse.lse[:, :, rows], truth.lse[:, :, rows])
    assert (got - want).abs().max() < 5e-3


@interpreted
@in_8_bits
def test_the_same_tiles_are_marked(method):
    """As by the truth's scores, except where those lie within rounding of the threshold."""
    q, k, v = draw(lq=256, lk=650, common=0.0)
    q = 2 * q
    fading = 3 * 0.6 ** torch.arange(11)
    k = (k * fading.repeat_interleave(TILE.k)[:650, None]).to(k.dtype)
    everything = make_lists(torch.ones(1, 2, *TILE.grid(256, 650), dtype=torch.bool))
    want = running_scores(q, k, 0.125, everything, TILE, "mass").float()
    got = KERNELS[method].forward(Inputs(q, k, v, 0.125), None, "mass").score
    pinned = torch.zeros(TILE.grid(256, 650), dtype=torch.bool)
    for threshold in (-6.0, -4.0, -2.0):
        here, there = (mark(None, score, threshold, pinned) for score in (got, want))
        assert 0 < there.float().mean() < 1
        assert ((want - threshold).abs() < 0.15)[here != there].all()


# ---- the method ---------------------------------------------------------------------------------


quantise_queries = qk_int8.quantise_queries


def per_query_tile(q: Tensor, mean: Tensor, scale: float) -> qk_int8.Queries:
    """As SageAttention quantises the queries: one unit for a whole tile."""
    ours = quantise_queries(q, mean, scale)
    tiles = torch.nn.functional.pad(qk_int8.rotated(q).abs(), (0, 0, 0, -q.shape[2] % TILE.q))
    largest = tiles.unflatten(2, (-1, TILE.q)).amax((-1, -2)).repeat_interleave(TILE.q, -1)
    largest = largest[..., : q.shape[2]]
    values = (qk_int8.rotated(q) * (127 / largest).unsqueeze(-1) + 0.5).floor().to(torch.int8)
    return ours._replace(values=values, unit=largest * (scale * math.log2(math.e) / 127))


@pytest.mark.parametrize("case", ["random", "common", "uneven rows", "peaked"])
def test_no_less_precise_than_sage_attention(case, monkeypatch):
    q, k, v = draw(lq=256, lk=640, d=128, common=5.0 if case == "common" else 0.0)
    if case == "uneven rows":
        q = (q * torch.logspace(-1, 0.5, 256).unsqueeze(-1)).to(q.dtype)
    if case == "peaked":
        q = 3 * q
    truth = dense_truth(q, k, v)
    ours = relative_error(TWINS[INT8].forward(Inputs(*doubled(q, k, v), 128**-0.5)).out, truth)
    monkeypatch.setattr(qk_int8, "quantise_queries", per_query_tile)
    sage = relative_error(TWINS[INT8].forward(Inputs(*doubled(q, k, v), 128**-0.5)).out, truth)
    assert ours <= sage
    assert ours < {"random": 0.012, "common": 0.012, "uneven rows": 0.025, "peaked": 0.035}[case]


def test_what_keys_have_in_common_costs_no_precision(monkeypatch):
    q, k, v = draw(d=128, common=5.0)
    truth = dense_truth(q, k, v)
    twin, call = TWINS[INT8], Inputs(*doubled(q, k, v), 128**-0.5)
    smoothed = relative_error(twin.forward(call).out, truth)
    monkeypatch.setattr(qk_int8, "mean_key", lambda k: torch.zeros_like(k[:, :, 0]).float())
    assert relative_error(twin.forward(call).out, truth) > 3 * smoothed


def test_the_lse_is_that_of_the_unshifted_keys():
    q, k, v = draw(common=5.0)
    got = TWINS[INT8].forward(Inputs(*doubled(q, k, v), 0.125)).lse
    assert (got - TRUTH.forward(Inputs(*doubled(q, k, v), 0.125)).lse).abs().max() < 0.02
