"""Attention, layer state and runs, on the float64 reference and on the CPU backend."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_run import SCALE, SIGMAS, local_qkv

from comfyui_liteattention import run as run_module
from comfyui_liteattention.attention import LayerState, attend
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.cpu.backend import CpuBackend
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.report.outcome import extremes
from comfyui_liteattention.report.statistics import status_line
from comfyui_liteattention.report.table import text_table
from comfyui_liteattention.run import (
    DENSE_LAYER,
    NOT_FINITE,
    NOT_FINITE_AGAIN,
    OUT_OF_MEMORY,
    Run,
)
from comfyui_liteattention.settings import SAFEST, Settings
from comfyui_liteattention.tiles import TileShape, unpack

BACKEND = ReferenceBackend(TileShape(16, 16))


def sample(run: Run, seed: int = 0, streams=("cond",), layer: str = "0") -> list[torch.Tensor]:
    q, k, v = local_qkv(seed, len(streams))
    outs = []
    for step, s in enumerate(SIGMAS[:-1]):
        run.begin_call(step)
        call = Inputs(q + s / 10, k, v, SCALE)
        outs.append(run.attend(layer, streams, run.locate(s), call))
        assert run.end_call(step, 0.0)
    return outs


def test_the_first_call_is_dense_and_later_ones_skip():
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    outs = sample(run)
    q, k, v = local_qkv(0)
    # In float64: torch's own float32 attention is off by more than ours.
    exact = (x.double() for x in (q + 0.1, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*exact, scale=SCALE)
    torch.testing.assert_close(outs[0].double(), dense, rtol=1e-5, atol=1e-5)
    report = run.finish()
    computed = [c.computed / c.total for c in report.calls]
    assert computed[0] == 1.0
    assert computed[-1] < 0.8
    assert report.active
    assert report.computed_fraction == pytest.approx(sum(computed) / 5)


def test_skipped_tiles_hold_what_the_settings_allow():
    """Frozen inputs: the lost mass of every row stays below 2**threshold."""
    settings = Settings(threshold=-4.0, ramp=0.0, audit=1)
    q, k, v = local_qkv(1)
    state = LayerState()
    for _ in range(3):
        out, tally = attend(state, BACKEND, Inputs(q, k, v, SCALE), settings, 1.0)
    live = unpack(state.live, 16)
    assert not live.all()
    full = BACKEND.forward(Inputs(q, k, v, SCALE), None, "mass")
    dead = full.score.exp2().masked_fill(live, 0).sum(-1)
    assert dead.max() < 2**-4
    assert 0 < float(tally.lost) < 2**-4
    # Every query tile was audited, so the output is exact.
    torch.testing.assert_close(out, full.out)


def test_the_audit_measures_the_true_lost_mass():
    settings = Settings(threshold=-2.0, ramp=0.0, audit=1)
    q, k, v = local_qkv(2)
    state = LayerState()
    attend(state, BACKEND, Inputs(q, k, v, SCALE), settings, 1.0)
    live = unpack(state.live, 16)
    _, tally = attend(state, BACKEND, Inputs(q, k, v, SCALE), settings, 1.0)
    p = torch.softmax((q @ k.mT).double() * SCALE, -1)
    tokens = live.repeat_interleave(16, -1).repeat_interleave(16, -2)[..., :250, :250]
    truth = p.masked_fill(tokens, 0).sum(-1).mean()
    assert float(tally.lost) == pytest.approx(float(truth), rel=1e-3)


def test_the_safest_threshold_is_dense_bit_for_bit():
    run = Run(Settings(threshold=SAFEST), BACKEND, SIGMAS)
    outs = sample(run)
    q, k, v = local_qkv(0)
    for out, sigma in zip(outs, SIGMAS, strict=False):
        assert torch.equal(out, BACKEND.forward(Inputs(q + sigma / 10, k, v, SCALE)).out)
    assert not run.finish().active


def test_streams_do_not_share_state_and_batching_does_not_matter():
    """Cond and uncond, in one batch, in two, or swapped half-way: the same bits."""
    q, k, v = local_qkv(3, batch=2)
    settings = Settings(threshold=-3.0)
    together, apart, swapped = (Run(settings, BACKEND, SIGMAS) for _ in range(3))
    for i, sigma in enumerate(SIGMAS[:-1]):
        at = together.locate(sigma)
        a = together.attend("0", ["u", "c"], at, Inputs(q, k, v, SCALE))
        b = torch.cat(
            [
                apart.attend("0", [s], at, Inputs(*(t[n : n + 1] for t in (q, k, v)), SCALE))
                for n, s in enumerate("uc")
            ]
        )
        assert torch.equal(a, b)
        if i < 2:
            c = swapped.attend("0", ["u", "c"], at, Inputs(q, k, v, SCALE))
        else:
            c = swapped.attend(
                "0", ["c", "u"], at, Inputs(q.flip(0), k.flip(0), v.flip(0), SCALE)
            ).flip(0)
        assert torch.equal(a, c)


def test_runs_and_layers_do_not_share_state():
    first = sample(Run(Settings(threshold=-3.0), BACKEND, SIGMAS), seed=4)
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    sample(run, seed=5, layer="other")
    again = sample(run, seed=4, layer="0")
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_a_changed_shape_starts_dense():
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    sample(run)
    q, k, v = local_qkv(0, tokens=300)
    out = run.attend("0", ["cond"], run.locate(0.2), Inputs(q, k, v, SCALE))
    assert torch.equal(out, BACKEND.forward(Inputs(q, k, v, SCALE)).out)


def test_dense_layers_never_skip():
    run = Run(Settings(threshold=-1.0, dense_layers=(1,)), BACKEND, SIGMAS)
    sample(run, layer="first")
    assert sample(run, layer="second") == [None] * 5  # they keep the user's own attention
    report = run.finish()
    assert {c.layer for c in report.calls} == {"first"}
    assert report.active
    assert report.reasons == {DENSE_LAYER: 5}


def test_a_result_that_is_not_finite_is_never_passed_on():
    """The host is told to call the model again; the layer is left to it from then on."""
    run = Run(Settings(), BACKEND, SIGMAS)
    q, k, v = local_qkv(0)
    v[0, 0, 7] = math.inf
    run.attend("0", ["c"], run.locate(1.0), Inputs(q, k, v, SCALE))
    run.attend("1", ["c"], run.locate(1.0), Inputs(q, k, v, SCALE))  # it got that
    assert not run.end_call(0, 1.0)
    good = Inputs(*local_qkv(0), SCALE)
    assert run.attend("0", ["c"], run.locate(0.8), good) is None
    assert run.attend("1", ["c"], run.locate(0.8), good) is not None
    assert run.end_call(1, 1.0)
    report = run.finish()
    assert report.reasons == {NOT_FINITE: 2}
    assert NOT_FINITE in status_line(report)
    # What was thrown away is not counted.
    assert [(call.layer, call.step) for call in report.calls] == [("1", 1)]


def test_where_results_are_not_finite_again_it_is_not_one_layers_fault():
    run = Run(Settings(), BACKEND, SIGMAS)
    q, k, v = local_qkv(0)
    v[0, 0, 7] = math.nan
    for step, layer in enumerate("01"):
        run.attend(layer, ["c"], run.locate(SIGMAS[step]), Inputs(q, k, v, SCALE))
        assert not run.end_call(step, 1.0)
    assert run.attend("2", ["c"], run.locate(0.6), Inputs(*local_qkv(0), SCALE)) is None
    assert run.end_call(2, 1.0)
    assert run.progress_text(2) == "switched off: results were not finite (NaN or infinity) again"
    report = run.finish()
    assert report.stopped == NOT_FINITE_AGAIN
    assert "nan" not in text_table(report)


def test_a_call_that_raised_leaves_nothing_for_the_next():
    run = Run(Settings(), BACKEND, SIGMAS)
    q, k, v = local_qkv(0)
    run.begin_call(0)
    run.attend("0", ["c"], run.locate(1.0), Inputs(q, k, v * math.nan, SCALE))
    run.begin_call(0)  # the host tries again with half the memory, say
    run.attend("0", ["c"], run.locate(1.0), Inputs(q, k, v, SCALE))
    assert run.end_call(0, 1.0)
    assert len(run.finish().calls) == 1


@pytest.mark.parametrize("backend", [BACKEND, CpuBackend()], ids=["reference", "cpu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_numbers_that_are_none_end_in_dense_attention(backend, bad, place):
    """With a budget, their scores are sorted into bins as well; other layers go on as they were."""
    if backend is not BACKEND:
        pytest.importorskip("numba")
    run = Run(Settings(budget=0.1, min_tokens=0, audit=4), backend, SIGMAS)
    for step, sigma in enumerate(SIGMAS[:-1]):
        for layer in ("0", "1"):
            tensors = dict(zip("qkv", local_qkv(0, tokens=500), strict=True))
            if layer == "0" and step == 2:
                tensors[place][0, 0, 7] = bad
            out = run.attend(layer, ["c"], run.locate(sigma), Inputs(*tensors.values(), SCALE))
            assert (out is None) == (layer == "0" and step > 2)
        assert run.end_call(step, 1.0) == (step != 2)
    report = run.finish()
    assert report.reasons == {NOT_FINITE: 3}
    fractions = [call.computed / call.total for call in report.calls if call.layer == "1"]
    # Step 2 was done again without us; at the next one all began again.
    assert len(fractions) == 4
    assert fractions[2] == 1
    assert fractions[3] < 1


def test_other_errors_are_not_hidden():
    class Broken(ReferenceBackend):
        def forward(self, *args, **kwargs):
            raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="don't fit"):
        sample(Run(Settings(min_tokens=0), Broken(), SIGMAS))


def test_the_report_reads_well():
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    sample(run, streams=("u", "c"))
    run.decline("a mask (regional prompt or padding)")
    run.end_call(0, 1.25)
    text = text_table(run.finish())
    assert "LiteAttention active" in text
    assert "threshold=-3.0" in text
    assert "1 x a mask" in text
    assert "1.25" in text


def test_nothing_remains_after_a_run():
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    sample(run)
    assert run.finish().maps
    assert not run.finish().maps
    assert not run.finish().calls


def test_threads_do_not_disturb_each_other():
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(sample, run, n, ("c",), f"layer {n}") for n in range(8)]
        together = [f.result() for f in futures]
    for n, outs in enumerate(together):
        alone = sample(Run(Settings(threshold=-3.0), BACKEND, SIGMAS), n, layer=f"layer {n}")
        assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))


def test_the_batch_may_change_from_step_to_step():
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    for batch in (2, 1, 2):
        out = run.attend("0", ["x"], run.locate(0.4), Inputs(*local_qkv(0, batch), SCALE))
        assert out is not None
        assert len(out) == batch


def test_nothing_is_estimated_where_nothing_was_timed():
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    sample(run)
    assert "saved" not in run.progress_text(4)
    report = run.finish()
    assert report.saved_seconds is None
    assert report.dense_seconds == {}
    assert "saved" not in status_line(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(dtype):
    x = torch.randn(1, 2, 70, 16).to(dtype)
    assert all(math.isfinite(end) for end in extremes(x))
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[0, 1, 33, 5] = bad
        assert not all(math.isfinite(end) for end in extremes(y))


def test_the_line_about_a_step():
    run = Run(Settings(threshold=-4.0, min_tokens=0, audit=16), BACKEND, SIGMAS)
    assert "inactive" in run.progress_text(0)
    sample(run)
    assert run.progress_text(0) == "step 1/5: 0% skipped, 0.00% lost"
    text = run.progress_text(4)
    assert text.startswith("step 5/5: ")
    assert float(text.split()[2].rstrip("%")) > 20


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_running_out_of_memory_ends_in_dense_attention(error):
    """Torch has its own error for that, and what it loads late and Triton have none."""

    class Full(ReferenceBackend):
        def forward(self, *args, **kwargs):
            raise error("CUDA error: out of memory")

    run = Run(Settings(min_tokens=0), Full(), SIGMAS)
    assert sample(run) == [None] * 5
    assert run.finish().reasons == {OUT_OF_MEMORY: 5}


def test_a_report_costs_nobody_the_video(monkeypatch):
    """Out of memory, or anything else, when the run is over."""
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    sample(run)

    def broken(*_):
        raise torch.OutOfMemoryError("no room for a map")

    monkeypatch.setattr("comfyui_liteattention.report.record.share_of_heads", broken)
    assert run.sound()
    report = run.report()
    assert report.maps == ()
    assert report.active
    monkeypatch.setattr(run_module, "look", broken)
    run.attend("0", ["c"], run.locate(0.2), Inputs(*local_qkv(0), SCALE))
    report = run.finish()
    assert "no room" in report.notes[0]
    text_table(report)


def test_a_picture_of_a_step_costs_nobody_the_run(monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("no room for a map")

    monkeypatch.setattr("comfyui_liteattention.report.map_history.small_map", broken)
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    assert None not in sample(run)
    assert run.finish().active


def test_maps_are_small_and_on_the_host():
    run = Run(Settings(threshold=-3.0), ReferenceBackend(TileShape(2, 2)), SIGMAS)
    sample(run)
    (found,) = run.finish().maps
    assert found.live.shape == (64, 64)
    assert found.live.device.type == "cpu"
    assert 0 < found.live.mean() < 1


def test_in_short_sequences_every_step_is_audited_by_some_layer():
    random = torch.Generator().manual_seed(3)
    settings = Settings(budget=0.2, ramp=0.0, min_tokens=0, audit=16, never_slower=False)
    run = Run(settings, ReferenceBackend(TileShape(16, 16), torch.float32), SIGMAS, SIGMAS)
    q = 3 * torch.randn(1, 2, 128, 32, generator=random)
    for step, sigma in enumerate(SIGMAS[:-1]):
        for layer in map(str, range(8)):
            run.attend(layer, ["a"], run.locate(sigma), Inputs(q, q, q, 0.17))
        assert run.end_call(step, 1.0)
    report = run.finish()
    for step in range(1, len(SIGMAS) - 1):  # the first is dense
        audited = [call for call in report.calls if call.step == step and call.lost is not None]
        assert 0 < len(audited) < 8
    assert report.lost_mass_mean > 0
