"""The kernels on a real card: run this first whenever a GPU is at hand, ``pytest tests/gpu``.

Skipped where there is none. **Never run yet.**
"""

from __future__ import annotations

import threading
import time
from itertools import product

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from comfyui_liteattention.backends import tile_map as torch_tile_map
from comfyui_liteattention.backends.base import Attended, Inputs, Skipped, rows_of
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.first_trusted import FirstTrusted
from comfyui_liteattention.backends.gpu.jit import JitLauncher, source
from comfyui_liteattention.backends.gpu.kernel_table import ATTEND, HEAD_DIMS, TILE
from comfyui_liteattention.backends.gpu.low_precision import LowPrecisionReference
from comfyui_liteattention.backends.gpu.prebuilt import process_launcher
from comfyui_liteattention.backends.pooled import audit_skipped, pool
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.budget.allocation import Limit
from comfyui_liteattention.run import Run
from comfyui_liteattention.schedule import Progress
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import make_lists, pack
from comfyui_liteattention.token_order import VideoTokens, take

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no graphics card")

DTYPES = (torch.float16, torch.bfloat16)
#: Of the weights and of sums in fp16, beside ties of the 8-bit grid that fall the other way.
ROUNDING = {"own": 5e-4, "fp16": 1.5e-3, "e4m3": 4e-2}
LAUNCHERS = {"cuda": process_launcher, "triton": JitLauncher}
CARD = torch.device("cuda", 0)
BEGUN, MINUTES = time.monotonic(), 8


@pytest.fixture(autouse=True)
def in_time():
    if time.monotonic() - BEGUN > 60 * MINUTES:
        pytest.skip(f"{MINUTES} minutes are over")


@pytest.fixture(params=product(LAUNCHERS, ("native", "int8", "fp8")), ids="-".join)
def backend(request):
    kind, mode = request.param
    chosen = KernelBackend(LAUNCHERS[kind](), mode)
    if reason := chosen.unavailable(CARD, "mass"):
        pytest.skip(reason)
    if kind == "triton" and type(source(ATTEND)).__name__ == "InterpretedFunction":
        pytest.skip("tests/kernels made triton interpret its kernels; run tests/gpu alone")
    return chosen


def draw(b=2, h=3, lq=700, lk=900, d=128, dtype=torch.bfloat16):
    return tuple(
        torch.randn(b, length, h, d, device="cuda", dtype=dtype).transpose(1, 2)
        for length in (lq, lk, lk)
    )


def draw_lists(backend, q, k, kept=0.5):
    tile = backend.tile_shape(q.shape[-1])
    shape = (*q.shape[:2], *tile.grid(q.shape[2], k.shape[2]))
    mask = torch.rand(shape, device=q.device) < kept
    mask[..., 0] = True
    return make_lists(mask)


def truth_of(backend, d, dtype):
    """What 8 bits round away is the mode's, not a fault of the kernel."""
    method = method_of(backend, d, dtype)
    return LowPrecisionReference(method, backend.tile_shape(d))


def method_of(backend, d, dtype):
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    method = backend.launcher.method(CARD, backend.mode, d, name)
    return method or pytest.skip(f"no {backend.mode} kernel for head_dim {d}")


def relative_error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def assert_close(got, want):
    """The same but for roundings: for code that was compiled apart, where sums may be fused and
    ordered in other ways. Plain attention in bf16 is about twice as far from the truth."""
    assert relative_error(got.out, want.out) < 1e-3
    assert torch.allclose(got.lse, want.lse, rtol=0, atol=1e-4)
    if want.score is not None and got.score is not None:
        assert torch.allclose(got.score, want.score, rtol=0, atol=0.05)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_test_passes(backend, dtype, d):
    assert backend.unsupported(*draw(d=d, dtype=dtype)) is None


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("criterion", [None, "mass", "gap"])
@pytest.mark.parametrize("skips", [False, True], ids=["dense", "lists"])
def test_matches_the_truth(backend, dtype, d, criterion, skips):
    if criterion not in backend.launcher.criteria:
        pytest.skip(f"no {criterion} among the prebuilt kernels")
    q, k, v = draw(d=d, dtype=dtype)
    lists = draw_lists(backend, q, k) if skips else None
    truth = truth_of(backend, d, dtype)
    want = truth.forward(Inputs(q.double(), k.double(), v.double(), d**-0.5), lists, criterion)
    got = backend.forward(Inputs(q, k, v, d**-0.5), lists, criterion)
    plain = truth.forward(
        Inputs(q, k, v, d**-0.5), lists
    ).out  # rounded to the dtype once, at the end
    floor = relative_error(plain, want.out)
    # A few ties of the 8-bit grid may fall the other way.
    assert (
        relative_error(got.out, want.out)
        <= 3 * floor + ROUNDING[method_of(backend, d, dtype).values]
    )
    assert (got.lse - want.lse).abs().max() < (1e-3 if backend.mode == "native" else 5e-3)
    if criterion:
        visited = want.score > -torch.inf
        assert torch.equal(visited, got.score > -torch.inf)
        assert (got.score >= want.score - 0.05).all(), "the running reference is never too low"
        assert (got.score <= 0.05).all()


def test_a_long_sequence_matches_sdpa(backend):
    q, k, v = draw(b=1, h=2, lq=20000, lk=20011)
    got = backend.forward(Inputs(q, k, v, 128**-0.5))
    assert (
        relative_error(got.out, scaled_dot_product_attention(q, k, v))
        < {**{"native": 1e-2, "int8": 2.5e-2, "fp8": 6e-2}}[backend.mode]
    )


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_int8_is_close_to_the_truth_where_keys_have_much_in_common(backend, d):
    if backend.mode != "int8" or d == 96:
        pytest.skip("about int8")
    q, k, v = draw(d=d)
    k = k + 5 * torch.randn(2, 3, 1, d, device="cuda", dtype=k.dtype)
    got = backend.forward(Inputs(q, k, v, d**-0.5))
    want = ReferenceBackend(backend.tile_shape(d)).forward(
        Inputs(q.double(), k.double(), v.double(), d**-0.5)
    )
    assert relative_error(got.out, want.out) < 2e-2
    assert (got.lse - want.lse).abs().max() < 5e-2


def test_naming_every_tile_is_dense(backend):
    """Bit for bit if the compiler treats both variants alike, which it doesn't promise."""
    q, k, v = draw()
    dense = backend.forward(Inputs(q, k, v, 0.1))
    for criterion in backend.launcher.criteria:
        got = backend.forward(Inputs(q, k, v, 0.1), draw_lists(backend, q, k, 1.0), criterion)
        assert_close(got, dense)


def test_the_same_call_gives_the_same_bits(backend):
    q, k, v = draw()
    lists = draw_lists(backend, q, k)
    first, *others = (backend.forward(Inputs(q, k, v, 0.1), lists, "mass") for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_on_another_stream_and_in_another_thread(backend):
    q, k, v = draw()
    want, got = backend.forward(Inputs(q, k, v, 0.1)).out, []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            got.append(backend.forward(Inputs(q, k, v, 0.1)).out)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(got) == 4 and all(torch.equal(x, want) for x in got)


def test_in_a_cuda_graph(backend):
    q, k, v = draw()
    lists = draw_lists(backend, q, k)
    backend.forward(Inputs(q, k, v, 0.1), lists, "mass")  # allocates and compiles what it needs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.forward(Inputs(q, k, v, 0.1), lists, "mass")
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.cuda.synchronize()
    want = backend.forward(Inputs(q, k, v, 0.1), lists, "mass")
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_a_new_kernel_can_be_loaded_while_a_graph_is_captured():
    backend = KernelBackend(process_launcher())
    if reason := backend.unavailable(torch.device("cuda", 0)):
        pytest.skip(reason)
    q, k, v = draw(d=64, dtype=torch.float16)
    backend.launcher._kernels.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.forward(Inputs(q, k, v, 0.1))
    graph.replay()
    assert torch.equal(captured.out, backend.forward(Inputs(q, k, v, 0.1)).out)


def whole_run(backend, device, dtype):
    """Ten steps of two layers with text before the video; the report and the last rows of text,
    ours and dense."""
    steps, text, grid, d = 10, 70, (4, 16, 16), 64
    run = Run(Settings(budget=0.05, audit=8, min_tokens=0), backend, range(steps, -1, -1))
    video = VideoTokens(grid, text)
    generator = torch.Generator().manual_seed(0)
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1)
    angle = place.reshape(-1, 3, 1) * torch.linspace(0.1, 0.4, d // 6 + 1)
    near = torch.cat([angle.cos(), angle.sin()], -1).flatten(1)[:, :d]
    near = torch.nn.functional.pad(near, (0, 0, text, 0))
    q, k, v = torch.randn(3, 1, 4, text + 1024, d, generator=generator)
    q, k, v = (x.to(device, dtype) for x in (q + 3 * near, k + 3 * near, v))
    for step in range(steps):
        for layer in ("first", "second"):
            progress = Progress(step, (step + 1) / steps)
            out = run.attend(layer, ["positive"], progress, Inputs(q, k, v, d**-0.5), video)
            assert out is not None and out.device == q.device and out.dtype == dtype
    dense = scaled_dot_product_attention(q, k, v)
    return run.finish(), out[:, :, :text], dense[:, :, :text]


def test_a_whole_run_holds_its_budget(backend):
    report, ours, dense = whole_run(backend, "cuda", torch.bfloat16)
    assert report.computed_fraction < 0.9
    assert 0 < report.lost_mass_mean < 0.05
    assert relative_error(ours, dense) < 0.02
    again = whole_run(backend, "cuda", torch.bfloat16)
    assert torch.equal(again[1], ours)
    assert again[0].computed_fraction == report.computed_fraction


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_on_the_second_card(backend):
    on_first = draw()
    on_second = [x.to("cuda:1") for x in on_first]
    assert backend.unsupported(*on_second) is None
    got, want = backend.forward(Inputs(*on_second, 0.1)), backend.forward(Inputs(*on_first, 0.1))
    # The cards may be different ones.
    assert_close(Attended(got.out.to("cuda:0"), got.lse.to("cuda:0"), None), want)


@pytest.mark.parametrize("shape", [(1, 4, 33, 70), (2, 12, 256, 1182)], ids=str)
@pytest.mark.parametrize("all_live", [False, True])
def test_the_tile_map_is_its_twin_s(backend, shape, all_live):
    kernels = backend.tile_map(CARD)
    assert kernels is not None, "its self-test failed"
    score = -torch.randint(0, 40, shape, device="cuda").float() / 2
    live = None if all_live else pack(torch.rand(shape, device="cuda") < 0.5)
    pinned = torch.rand(shape[2:], device="cuda") < 0.05
    got, want = (x.histogram(live, score, pinned) for x in (kernels, torch_tile_map))
    assert torch.equal(got, want)
    ledger = torch.tensor([0.02, 0.01, 0.03, 2.0], dtype=torch.float64, device="cuda")
    others = [torch.full((161,), 1e-4, dtype=torch.float64, device="cuda")] * 29
    for lost in (None, ledger[1]):
        rest = (shape[0] * shape[1] * shape[2], ledger, lost, 0.3, others, 0.05)
        ours, theirs = (x.choose(want, *rest) for x in (kernels, torch_tile_map))
        pairs = zip((*ours.limit, *ours[1:]), (*theirs.limit, *theirs[1:]), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    back = Limit(*(torch.tensor(x, device="cuda") for x in (-9.0, True)))
    for limit in (-9.0, back):
        got, want = (x.next_live(live, score, limit, pinned) for x in (kernels, torch_tile_map))
        assert torch.equal(got, want)
    for alternate in (False, True):
        lists = [x.make_lists(want, shape[-1], alternate) for x in (kernels, torch_tile_map)]
        assert torch.equal(lists[0].count, lists[1].count)
        assert torch.equal(lists[0].index, lists[1].index)


def test_an_order_of_queries_changes_nothing_else(backend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in draw())
    order = torch.randperm(q.shape[2], device="cuda")
    lists = draw_lists(backend, q, k, 0.5)
    want = backend.forward(Inputs(take(q, order), k, v, 0.1), lists, "mass")
    got = backend.forward(Inputs(q, k, v, 0.1, order), lists, "mass")
    assert torch.equal(take(got.out, order), want.out) and torch.equal(got.score, want.score)
    assert torch.equal(got.lse[:, :, order], want.lse)


def test_an_audit_of_means_is_its_twin_s(backend):
    q, k, v = draw()
    tile = backend.tile_shape(q.shape[-1])
    grid = tile.grid(q.shape[2], k.shape[2])
    live = torch.rand(*q.shape[:2], *grid, device="cuda") < 0.5
    live[..., 0] = True
    order, audited = torch.randperm(q.shape[2], device="cuda"), range(1, grid[0])
    kept = backend.forward(Inputs(q, k, v, 0.1, order), make_lists(live), None)
    full = backend.forward(Inputs(q[:, :, rows_of(audited, tile, order)], k, v, 0.1))
    case = (kept, Skipped(q, pool(k, v, tile.k), 0.1, pack(live), order), full, audited)
    pairs = zip(backend.audit_skipped(*case), audit_skipped(*case, tile), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=0.02, atol=1e-3)


def test_a_backend_that_fails_its_self_test_hands_over(backend):
    class Broken(KernelBackend):
        def provide(self, device, head_dim, dtype):
            return "broken on purpose"

    chain = FirstTrusted([Broken(process_launcher()), backend])
    assert chain.provide(CARD, 128, torch.bfloat16) is backend
    assert chain.name == backend.name


def test_tile_shape_is_the_table_s():
    assert KernelBackend(process_launcher()).tile_shape(128) == TILE
