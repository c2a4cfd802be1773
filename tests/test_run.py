"""Attention, layer state and runs, on the float64 reference and on the CPU backend."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_liteattention import run as run_module
from comfyui_liteattention.attention import LayerState, attend
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.pace import full_pace, stopwatch, too_slow, trend
from comfyui_liteattention.report import status_line, text_table
from comfyui_liteattention.run import DENSE_LAYER, NOT_FINITE, OUT_OF_MEMORY, Run
from comfyui_liteattention.settings import SAFEST, Settings
from comfyui_liteattention.tiles import TileShape, unpack

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
SCALE = 32**-0.5
BACKEND = ReferenceBackend(TileShape(16, 16))


def local_qkv(seed: int, batch: int = 1, tokens: int = 250):
    """Queries that look mostly at keys nearby, so that far tiles are negligible."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.linspace(0, math.pi, tokens).unsqueeze(-1) * torch.arange(1, 17)
    place = torch.cat([angle.cos(), angle.sin()], -1)
    noise = torch.randn(3, batch, 2, tokens, 32, generator=generator)
    return 4 * place + noise[0], 4 * place + noise[1], noise[2]


def sample(run: Run, seed: int = 0, streams=("cond",), layer: str = "0") -> list[torch.Tensor]:
    q, k, v = local_qkv(seed, len(streams))
    return [run.attend(layer, streams, run.locate(s), q + s / 10, k, v, SCALE) for s in SIGMAS[:-1]]


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
        out, tally = attend(state, BACKEND, q, k, v, SCALE, settings, 1.0)
    live = unpack(state.live, 16)
    assert not live.all()
    full = BACKEND.forward(q, k, v, SCALE, None, "mass")
    dead = full.score.exp2().masked_fill(live, 0).sum(-1)
    assert dead.max() < 2**-4
    assert 0 < float(tally.lost) < 2**-4
    # Every query tile was audited, so the output is exact.
    torch.testing.assert_close(out, full.out)


def test_the_audit_measures_the_true_lost_mass():
    settings = Settings(threshold=-2.0, ramp=0.0, audit=1)
    q, k, v = local_qkv(2)
    state = LayerState()
    attend(state, BACKEND, q, k, v, SCALE, settings, 1.0)
    live = unpack(state.live, 16)
    _, tally = attend(state, BACKEND, q, k, v, SCALE, settings, 1.0)
    p = torch.softmax((q @ k.mT).double() * SCALE, -1)
    tokens = live.repeat_interleave(16, -1).repeat_interleave(16, -2)[..., :250, :250]
    truth = p.masked_fill(tokens, 0).sum(-1).mean()
    assert float(tally.lost) == pytest.approx(float(truth), rel=1e-3)


def test_the_safest_threshold_is_dense_bit_for_bit():
    run = Run(Settings(threshold=SAFEST), BACKEND, SIGMAS)
    outs = sample(run)
    q, k, v = local_qkv(0)
    for out, sigma in zip(outs, SIGMAS, strict=False):
        assert torch.equal(out, BACKEND.forward(q + sigma / 10, k, v, SCALE).out)
    assert not run.finish().active


def test_streams_do_not_share_state_and_batching_does_not_matter():
    """Cond and uncond, in one batch, in two, or swapped half-way: the same bits."""
    q, k, v = local_qkv(3, batch=2)
    settings = Settings(threshold=-3.0)
    together, apart, swapped = (Run(settings, BACKEND, SIGMAS) for _ in range(3))
    for i, sigma in enumerate(SIGMAS[:-1]):
        at = together.locate(sigma)
        a = together.attend("0", ["u", "c"], at, q, k, v, SCALE)
        b = torch.cat(
            [
                apart.attend("0", [s], at, *(t[n : n + 1] for t in (q, k, v)), SCALE)
                for n, s in enumerate("uc")
            ]
        )
        assert torch.equal(a, b)
        if i < 2:
            c = swapped.attend("0", ["u", "c"], at, q, k, v, SCALE)
        else:
            c = swapped.attend("0", ["c", "u"], at, q.flip(0), k.flip(0), v.flip(0), SCALE).flip(0)
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
    out = run.attend("0", ["cond"], run.locate(0.2), q, k, v, SCALE)
    assert torch.equal(out, BACKEND.forward(q, k, v, SCALE).out)


def test_dense_layers_never_skip():
    run = Run(Settings(threshold=-1.0, dense_layers=(1,)), BACKEND, SIGMAS)
    sample(run, layer="first")
    assert sample(run, layer="second") == [None] * 5  # they keep the user's own attention
    report = run.finish()
    assert {c.layer for c in report.calls} == {"first"}
    assert report.active
    assert report.reasons == {DENSE_LAYER: 5}


def test_a_result_that_is_not_finite_is_never_passed_on():
    run = Run(Settings(), BACKEND, SIGMAS)
    q, k, v = local_qkv(0)
    v[0, 0, 7] = math.inf
    assert run.attend("0", ["c"], run.locate(1.0), q, k, v, SCALE) is None
    assert run.attend("0", ["c"], run.locate(0.8), *local_qkv(0), SCALE) is None
    assert run.attend("1", ["c"], run.locate(0.8), *local_qkv(0), SCALE) is not None
    report = run.finish()
    assert report.reasons == {NOT_FINITE: 2}
    assert NOT_FINITE in status_line(report)


def test_the_report_reads_well():
    run = Run(Settings(threshold=-3.0), BACKEND, SIGMAS)
    sample(run, streams=("u", "c"))
    run.decline("a mask (regional prompt or padding)")
    run.time_step(0, 1.25)
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
        alone = sample(Run(Settings(threshold=-3.0), BACKEND, SIGMAS), n)
        assert all(torch.equal(a, b) for a, b in zip(outs, alone, strict=True))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the next stopwatches show, instead of real ones."""
    seconds = []
    monkeypatch.setattr(run_module, "stopwatch", lambda device: lambda: seconds.pop(0))
    return seconds


def test_a_run_stops_skipping_where_the_users_attention_is_faster(clock):
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    q, k, v = local_qkv(0)
    clock += [3.0, 1.0]  # ours, dense
    outs = [
        run.attend("0", ["x"], run.locate(s), q, k, v, SCALE, dense=v.clone) for s in SIGMAS[:-1]
    ]
    assert outs[0] is not None
    assert outs[1:] == [None] * 4
    assert clock == []
    report = run.finish()
    assert "faster here" in status_line(report)
    assert not report.active


def test_a_faster_run_is_left_alone(clock):
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    q, k, v = local_qkv(0)
    clock += [1.0, 1.2, 1.0, 0.8, 0.6, 0.6]
    outs = [
        run.attend("0", ["x"], run.locate(s), q, k, v, SCALE, dense=v.clone) for s in SIGMAS[:-1]
    ]
    assert all(out is not None for out in outs)
    report = run.finish()
    assert report.attention_speedup == pytest.approx(5 * 1.2 / 4.0)
    assert "x as fast" in status_line(report)


def test_the_seconds_saved_are_what_dense_calls_take_beyond_ours(clock):
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    q, k, v = local_qkv(0)
    clock += [10.0, 12.0, 9.0, 8.0, 6.0, 5.0]  # the second is dense
    for step, sigma in enumerate(SIGMAS[:-1]):
        run.attend("0", ["x"], run.locate(sigma), q, k, v, SCALE, dense=v.clone)
        run.time_step(step, 30.0)
        text = run.progress_text(step)
    report = run.finish()
    # The dense call beside ours is no saving.
    assert report.saved_seconds == pytest.approx(5 * 12 - 38 - 12)
    assert text.endswith(", saved about 10 s")
    assert "saved about 10 s (estimated)" in status_line(report)
    assert report.dense_seconds == pytest.approx({0: 20, 1: 33, 2: 34, 3: 36, 4: 37})


def test_the_time_that_timing_takes_is_not_called_saved(clock):
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    clock += [10.0, 12.0]
    q, k, v = local_qkv(0)
    run.attend("0", ["x"], run.locate(1.0), q, k, v, SCALE, dense=v.clone)
    assert run.progress_text(0).endswith("cost about 10 s")


def test_two_layers_and_two_conditionings_share_one_rate(clock):
    """The first measurement also loads things, and doesn't count once there is another."""
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS[-2:])
    clock += [90.0, 90.0, 1.0, 2.0]
    q, k, v = local_qkv(0, batch=2)
    for layer in ("0", "1"):
        run.attend(layer, ["u", "c"], run.locate(0.2), q, k, v, SCALE, dense=v.clone)
    report = run.finish()
    assert report.timing == 92
    assert report.saved_seconds == pytest.approx(2 * 2 - 91 - 92)
    assert [call.seconds for call in report.calls] == [45, 45, 0.5, 0.5]


def test_nothing_is_estimated_where_nothing_was_timed():
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    sample(run)
    assert "saved" not in run.progress_text(4)
    report = run.finish()
    assert report.saved_seconds is None
    assert report.dense_seconds == {}
    assert "saved" not in status_line(report)


@pytest.mark.parametrize(
    ("ratio", "fractions", "stops"),
    [
        (0.9, [1.0, 1.0, 1.0], False),  # never behind
        (1.1, [1.0, 0.9, 0.85], False),  # a little behind, catching up
        (1.1, [1.0, 1.0, 1.0, 1.0, 1.0], True),  # nothing to skip
        (2.5, [1.0], True),  # hopeless
        (1.4, [1.0], False),  # behind, but nothing could be skipped yet
        (1.4, [1.0, 0.93], False),  # goes on like that, it is ahead at the end
        (1.4, [1.0, 0.97, 0.96, 0.95], True),  # too little
        (1.3, [1.0, 0.6], False),  # behind at first, ahead at the end
    ],
)
def test_when_to_stop(ratio, fractions, stops):
    assert too_slow([ratio * f for f in fractions], fractions, 20) == stops


def test_a_few_steps_are_not_given_up_for_one_slow_first_step():
    assert not too_slow([1.3], [1.0], 4)
    assert not too_slow([1.3, 0.8], [1.0, 0.75], 4)
    assert too_slow([1.3, 1.2], [1.0, 0.95], 4)


@given(
    steps=st.integers(4, 50),
    ratio=st.floats(1.0, 2.0),
    fall=st.floats(0.001, 0.2),
    lowest=st.floats(0.1, 1.0),
)
def test_however_the_tiles_fall_little_is_lost(steps, ratio, fall, lowest):
    """They fall as if it would pay, and stop falling."""
    paces: list[float] = []
    fractions: list[float] = []
    for step in range(steps):
        fractions.append(max(1 - fall * step, lowest))
        paces.append(ratio * fractions[-1])
        if too_slow(paces, fractions, steps):
            break
    # One step more: it must have been taken to be seen.
    assert sum(pace - 1 for pace in paces) <= max(0.1 * steps, 0.4) + ratio - 1


def test_a_run_that_is_faster_by_now_goes_on():
    """However far behind: to stop would only keep it there."""
    fractions = [1.0, 0.95, 0.9, 0.85, 0.8] + [0.75] * 8
    assert too_slow([1.4 * f for f in fractions], fractions, 20)  # still slower
    paces = [1.4 * f for f in fractions[:-1]] + [0.98]
    assert not too_slow(paces, fractions, 20)


def test_a_dense_start_is_no_reason_to_stop():
    assert not too_slow([1.1] * 5, [1.0] * 5, 20, dense_steps=5)
    assert too_slow([1.1] * 7, [1.0] * 7, 20, dense_steps=5)
    warm = Run(Settings(threshold=-4.0, warmup=0.4), BACKEND, SIGMAS)
    assert warm._dense_steps() == 3
    assert Run(Settings(threshold=-4.0), BACKEND, SIGMAS)._dense_steps() == 1


def test_one_disturbed_step_does_not_count():
    assert full_pace([1.0, 0.9, 5.0], [1.0, 0.9, 0.8]) == pytest.approx(1.0)


def test_a_trend_never_rises_and_never_falls_far():
    assert trend([1.0, 0.8], 4) == pytest.approx([0.6, 0.4, 0.25, 0.25])
    assert trend([1.0, 0.8, 0.9], 2) == pytest.approx([0.9, 0.9])
    assert trend([0.5, 0.2], 2) == pytest.approx([0.2, 0.2])
    assert trend([1.0], 2) == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(dtype):
    x = torch.randn(1, 2, 70, 16).to(dtype)
    assert run_module._finite(x)
    for bad in (math.nan, math.inf, -math.inf):
        y = x.clone()
        y[0, 1, 33, 5] = bad
        assert not run_module._finite(y)


def test_a_stopwatch_counts_seconds():
    read = stopwatch(torch.device("cpu"))
    assert 0 <= read() <= read() < 5


def test_the_line_about_a_step():
    run = Run(Settings(threshold=-4.0, min_tokens=0, audit=16), BACKEND, SIGMAS)
    assert "inactive" in run.progress_text(0)
    sample(run)
    assert run.progress_text(0) == "step 1/5: 0% skipped, 0.00% lost"
    text = run.progress_text(4)
    assert text.startswith("step 5/5: ")
    assert float(text.split()[2].rstrip("%")) > 20


def test_running_out_of_memory_ends_in_dense_attention():
    class Full(ReferenceBackend):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    run = Run(Settings(min_tokens=0), Full(), SIGMAS)
    assert sample(run) == [None] * 5
    assert run.finish().reasons == {OUT_OF_MEMORY: 5}
