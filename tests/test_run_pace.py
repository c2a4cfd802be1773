"""Never slower: runs that time the user's own attention first, and what they tell of it."""

from functools import partial

import pytest
import torch
from tiny_run import SCALE, SIGMAS, local_qkv
from torch.nn.functional import scaled_dot_product_attention as attention

from comfyui_liteattention import run as run_module
from comfyui_liteattention.attention import Part
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.never_slower import dense as dense_module
from comfyui_liteattention.never_slower import rehearsal
from comfyui_liteattention.never_slower.costs import Costs
from comfyui_liteattention.never_slower.dense import Dense
from comfyui_liteattention.never_slower.rehearsal import forget_decisions
from comfyui_liteattention.report.statistics import status_line
from comfyui_liteattention.report.table import text_table
from comfyui_liteattention.run import TIMED, WAITING, Run
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape

BACKEND = ReferenceBackend(TileShape(16, 16))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the next stopwatches show, instead of real ones."""
    seconds = []

    def stop():
        now = seconds.pop(0)
        return lambda: now

    for module in (run_module, dense_module):
        monkeypatch.setattr(module, "stopwatch", lambda device: stop)
    return seconds


@pytest.fixture
def costs(monkeypatch):
    """What was measured in this process before: a full call takes so many times as long."""

    def known(full):
        found = Costs(full, 0.0, 0.5, 0.2)
        monkeypatch.setattr(run_module, "decided", lambda *_: found)

    return known


def timed(run, layers=4, streams=("x",)):
    """A run of some layers; the calls that were ours, as (step, layer)."""
    q, k, v = local_qkv(0, len(streams))
    ours = []
    for step, sigma in enumerate(SIGMAS[:-1]):
        run.begin_call(step)
        for layer in range(layers):
            call, dense = Inputs(q, k, v, SCALE), Dense(v.clone)
            if run.attend(str(layer), streams, run.locate(sigma), call, dense=dense) is None:
                dense()
            else:
                ours.append((step, layer))
        assert run.end_call(step, 30.0)
    return ours


def test_the_first_calls_are_left_to_the_users_attention(clock, costs):
    costs(0.9)
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    clock += [9.0, 2.0, 2.0, *[2.0] + [1.0] * 16]
    ours = timed(run)
    assert ours == [(0, 3), *((step, layer) for step in range(1, 5) for layer in range(4))]
    report = run.finish()
    assert report.reasons == {TIMED: 3}
    assert [call.waits for call in report.calls[:5]] == [True] * 3 + [False] * 2
    # They count as what they are, calls that computed every tile and lost nothing.
    assert [call.computed / call.total for call in report.calls[:4]] == [1.0] * 4
    # The first measurement also loads and prepares things.
    assert report.dense_rate == 2.0 / report.calls[0].total
    assert report.saved_seconds == pytest.approx(16)
    assert report.attention_speedup == pytest.approx(17 * 2 / 18)
    assert report.dense_seconds == pytest.approx({0: 30, 1: 34, 2: 34, 3: 34, 4: 34})
    assert "saved about 16 s (estimated)" in status_line(report)
    assert "it begins at step 1 " in text_table(report)


def test_the_line_of_a_step_says_what_was_saved(clock, costs):
    costs(0.9)
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    clock += [2.0] * 3 + [1.0] * 17
    timed(run)
    assert run.progress_text(4).endswith(", saved about 17 s")


def test_a_run_never_begins_where_the_users_attention_is_faster(clock, costs):
    costs(3.0)
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    clock += [1.0] * 3
    assert timed(run) == []
    report = run.finish()
    assert report.stopped is not None
    assert "faster here" in status_line(report)
    assert "3.00 times" in status_line(report)


def test_a_run_waits_for_the_step_from_which_on_it_pays(clock, costs):
    costs(1.26)
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    clock += [1.0] * 40
    assert timed(run, layers=8)[0] == (1, 0)
    report = run.finish()
    assert list(report.reasons) == [TIMED, WAITING]
    assert report.reasons[TIMED] == 3
    assert "it begins at step 2 " in text_table(report)


def test_two_conditionings_in_one_call_share_its_time(clock, costs):
    costs(0.9)
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    clock += [2.0] * 3 + [1.0] * 17
    timed(run, streams=("u", "c"))
    report = run.finish()
    assert [call.seconds for call in report.calls[:8]] == [1.0] * 6 + [0.5] * 2
    assert report.saved_seconds == pytest.approx(17)


def test_while_nothing_can_be_skipped_all_layers_wait(clock, costs):
    costs(0.9)
    run = Run(Settings(threshold=-4.0, min_tokens=0, warmup=0.6), BACKEND, SIGMAS)
    clock += [2.0] * 20
    assert timed(run)[0] == (3, 0)


def test_the_same_seed_gives_the_same_bits_in_the_first_run_and_later():
    """With the settings as they are, and the clock of this machine."""
    forget_decisions()
    settings = Settings(budget=0.1, min_tokens=0)
    outs = []
    for _ in range(3):
        run = Run(settings, BACKEND, SIGMAS, kind="a model")
        taken = []
        for step, sigma in enumerate(SIGMAS[:-1]):
            q, k, v = local_qkv(step)
            for layer in range(4):
                call, dense = (
                    Inputs(q, k, v, SCALE),
                    Dense(partial(attention, q, k, v, scale=SCALE)),
                )
                out = run.attend(str(layer), ["x"], run.locate(sigma), call, dense=dense)
                taken.append(dense() if out is None else out)
            assert run.end_call(step, 1.0)
        outs.append((taken, run.finish()))
    (first, _), *others = outs
    for again, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({report.notes for _, report in outs}) == 1
    assert len({report.stopped for _, report in outs}) == 1


def test_it_is_measured_once_in_a_process_for_each_kind_of_call(monkeypatch):
    forget_decisions()
    rehearsed = []
    real = rehearsal.rehearse
    monkeypatch.setattr(
        rehearsal, "rehearse", lambda *given: rehearsed.append(given) or real(*given)
    )
    settings = Settings(threshold=-4.0, min_tokens=0)
    for kind in ("a", "a", "b"):
        timed(Run(settings, BACKEND, SIGMAS, kind=kind))
    assert len(rehearsed) == 2
    timed(Run(settings, BACKEND, SIGMAS, kind="a"), streams=("x", "y"))  # of the same size each
    assert len(rehearsed) == 2


def test_a_schedule_of_unknown_length_ends_in_no_error(clock):
    """The user's own loop, with the settings as they are."""
    forget_decisions()
    run = Run(Settings(min_tokens=0), BACKEND, ())
    clock += [1.0] * 20
    timed(run)
    assert run.finish().steps == 0


def test_parts_of_different_lengths_are_timed_together(clock, costs):
    """A mask that differs from row to row."""
    costs(0.9)
    run = Run(Settings(threshold=-4.0, min_tokens=0), BACKEND, SIGMAS)
    clock += [2.0] * 3 + [1.0] * 17
    parts = [Part(n, Inputs(*local_qkv(0, tokens=n), SCALE)) for n in (250, 180)]
    for step, sigma in enumerate(SIGMAS[:-1]):
        outs = None
        for layer in range(4):
            dense = Dense(lambda: parts[0].inputs.v)
            outs = run.attend_parts(str(layer), run.locate(sigma), parts, dense)
            _ = outs or dense()
        assert outs is not None
        assert [out.shape[2] for out in outs] == [250, 180]
        assert run.end_call(step, 1.0)
    report = run.finish()
    assert report.saved_seconds == pytest.approx(17)
    assert {call.tokens for call in report.calls} == {250, 180}


def test_without_never_slower_nothing_waits_and_nothing_is_timed():
    run = Run(Settings(threshold=-4.0, min_tokens=0, never_slower=False), BACKEND, SIGMAS)
    assert len(timed(run)) == 20
    assert run.finish().dense_rate is None
