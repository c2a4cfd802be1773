"""Tiny instances of ComfyUI's own model classes, with random weights and their real forward.

A backend that finds every tile negligible skips as much as the policy lets it: what then remains is
what must never be skipped. Whatever a model lists beside its video is known here a second time, by
hand, and compared with what happened.
"""

from dataclasses import replace

import pytest
import torch
from packaging.version import parse
from recorder import TILE, Recorder
from tiny_comfy import (
    ANIMATE_2,
    CASES,
    HUNYUAN_CASE,
    NEWER,
    SAMPLED,
    conditioning,
    find,
    make_model,
    noise,
    sample,
    version,
)

from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.integrations.comfy import families
from comfyui_liteattention.integrations.comfy.families import ModelCall, describe_call
from comfyui_liteattention.run import Run
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SIGMAS = [1.0, 0.7, 0.4, 0.0]
BOLD = {"threshold": -1.0, "criterion": "gap", "ramp": 0, "audit": 0, "min_tokens": 0}
BOLD["never_slower"] = False
OVERRIDE = "optimized_attention_override"


@pytest.fixture
def build(comfy):
    def build_one(case):
        if version() < parse(case.since):
            pytest.skip(f"{case.name} needs ComfyUI {case.since}, this is {version()}")
        return make_model(case)

    return build_one


def generate(model, case, backend=None, batches=(("a",),)):
    """Three steps: the outputs, ``(ours, dense, accepted)`` of every attention call, the report and
    its notes. ``batches`` are the model calls of a step, each with its conditionings."""
    from comfy.model_patcher import ModelPatcher

    from comfyui_liteattention.integrations.comfy.sampling import Sampling

    settings = Settings(
        threshold=-1.0, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False
    )
    run = Run(settings, backend or Recorder(-50.0), SIGMAS)
    sampling, options, seen = Sampling(run), {}, []
    if backend is not None:
        sampling.install(options)
    ours = options.get(OVERRIDE, lambda func, *args, **kwargs: func(*args, **kwargs))

    def spy(func, q, k, v, *args, **kwargs):
        dense = func(q, k, v, *args, **kwargs)
        before = _made(run)
        out = ours(func, q, k, v, *args, **kwargs)
        seen.append((out, dense, _made(run) > before))
        return out

    options[OVERRIDE] = spy
    outputs = []
    for sigma in SIGMAS[:-1]:
        now = torch.tensor([sigma])
        for batch in batches:
            step = dict(options, sigmas=now, sample_sigmas=torch.tensor(SIGMAS))
            step |= dict(cond_or_uncond=[0] * len(batch), uuids=list(batch))
            inputs = {k: _repeat(v, len(batch)) for k, v in case.inputs().items()}
            x = noise(case.latent, 1).repeat(len(batch), *[1] * (len(case.latent) - 1))
            with torch.inference_mode():
                out = model.apply_model(
                    x, now.repeat(len(batch)), transformer_options=step, **inputs
                )
            outputs.extend(out.split(len(x) // len(batch)))
    sampling._first = None  # that was the spy
    report = sampling.finish(ModelPatcher(model, CPU, CPU), options)
    return outputs, seen, report, list(report.notes)


def _made(run):
    """Attention calls of this call of the model that were ours."""
    return sum(map(len, run._open.values()))


def _repeat(value, times):
    if torch.is_tensor(value) and times > 1:
        return value.repeat(times, *[1] * (value.ndim - 1))
    return value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_video_tiles_are_skipped(build, case):
    backend = Recorder(-50.0)
    _, seen, report, notes = generate(build(case), case, backend)
    before, after = case.before, case.after + case.joint
    if case.joint and version() >= NEWER:
        before, after = case.joint + case.before, case.after
    length = before + case.video + after
    assert not notes
    assert {call.tokens for call in report.calls} == {length - case.hidden}
    layers = len({call.layer for call in report.calls})
    assert layers == case.layers
    assert len(report.calls) == layers * 3
    assert {c.step for c in report.calls if c.computed < c.total} == {1, 2}

    video = slice(before, before + case.video)
    pinned = before + after - case.hidden
    other = torch.ones(length, dtype=torch.bool)
    other[video] = False
    taken = [(out, dense) for out, dense, accepted in seen if accepted]
    assert len(taken) == len(backend.calls) == len(report.calls)
    for (q, lists), (out, dense), call in zip(backend.calls, taken, report.calls, strict=True):
        close = torch.isclose(out, dense, rtol=1e-4, atol=1e-4)
        rows = close.unflatten(-1, (-1, q.shape[3])).all(-1) if close.ndim == 3 else close.all(-1)
        rows = rows.transpose(1, 2) if close.ndim == 3 else rows  # [B, H, L]
        if call.step == 0:
            assert lists is None
            assert rows.all()
            continue
        assert rows[..., other].all(), "a row of text or of a reference is not dense"
        assert not rows[..., video].all()
        live = torch.zeros_like(lists.index, dtype=torch.bool)
        valid = torch.arange(lists.index.shape[-1]) < lists.count.unsqueeze(-1)
        live.scatter_(-1, lists.index.long(), valid)
        tiles = -(-pinned // TILE)  # what is not video is listed first
        assert live[:, :, :tiles].all()
        assert live[..., :tiles].all()
        assert (lists.count[..., tiles:] == max(tiles, 1)).all()
    for out, dense, accepted in seen:
        assert accepted or torch.equal(out, dense)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_with_nothing_to_skip_the_result_is_the_dense_one(build, case):
    model = build(case)
    plain = generate(model, case)[0]
    patched, _, report, _ = generate(model, case, Recorder(0.0))
    assert not report.active
    for a, b in zip(plain, patched, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SAMPLED)
def test_the_sampler_calls_it_with_the_same_names(comfy, build, monkeypatch, name):
    """The conditionings above are written by hand; here ComfyUI makes them, and samples."""
    import comfy.model_patcher
    import comfy.sample

    from comfyui_liteattention.integrations.comfy import session as integration

    case = find(name)
    settings = Settings(
        threshold=-1.0, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False
    )
    monkeypatch.setattr(integration, "_backend", lambda *_: Recorder(-50.0))
    patcher = comfy.model_patcher.ModelPatcher(build(case), CPU, CPU)
    patched = integration.apply_patch(patcher, settings)
    positive, negative = (conditioning(case, i) for i in range(2))
    latent = torch.zeros(case.latent)
    if "latent_shapes" in case.conds:  # video and sound
        from comfy.nested_tensor import NestedTensor

        latent = NestedTensor([torch.zeros(shape) for shape in case.conds["latent_shapes"]])
    start = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        comfy.sample.sample(
            *(patched, start, 3, 3.0, "euler", "simple", positive, negative, latent), seed=1
        )
    report = integration.patch_of(patched).last_report
    assert report.active
    length = case.before + case.video + case.after + case.joint - case.hidden
    assert {c.tokens for c in report.calls} == {length}
    assert len(report.calls) == 3 * case.layers * 2


def test_an_unknown_video_model_runs_in_generic_mode(build, monkeypatch):

    model = build(CASES[0])
    monkeypatch.setattr(families, "FAMILIES", {})
    _, _, report, notes = generate(model, CASES[0], Recorder(-50.0))
    assert {call.tokens for call in report.calls} == {96}
    assert report.active
    assert notes == [
        "generic mode: WanModel is not known; only attention over the bare video is skipped"
    ]


@pytest.mark.parametrize("name", ["HunyuanVideo", "Wan HuMo", "Mochi", "Flux", "Qwen-Image"])
def test_an_unknown_model_with_more_than_video_stays_dense(build, monkeypatch, name):
    """Text or references make its sequence longer than the video, or its latent is an image."""

    case = find(name)
    model = build(case)
    monkeypatch.setattr(families, "FAMILIES", {})
    _, seen, report, _ = generate(model, case, Recorder(-50.0))
    assert not report.calls
    assert all(torch.equal(out, dense) for out, dense, _ in seen)
    name = type(model.diffusion_model).__name__
    why = (f"{name} is not supported yet", f"this model is not supported ({name})")
    assert any(reason.startswith(why) for reason in report.reasons)


def test_a_mask_with_weights_stays_dense_with_the_reason(build):
    conds = HUNYUAN_CASE.conds | dict(attention_mask=torch.full((1, 12), -0.5))
    case = replace(HUNYUAN_CASE, conds=conds)
    _, seen, report, _ = generate(build(case), case, Recorder(-50.0))
    assert not report.calls
    assert all(torch.equal(out, dense) for out, dense, _ in seen)
    assert "a mask (regional prompt or padding)" in report.reasons


def test_the_text_refiner_is_not_the_video(build):
    _, _, report, _ = generate(build(HUNYUAN_CASE), HUNYUAN_CASE, Recorder(-50.0))
    assert "not the model's video attention (12 tokens; that has 108)" in report.reasons
    assert {call.layer for call in report.calls} == {
        "double-0",
        "double-1",
        "single-0",
        "single-1",
    }


def test_sound_as_long_as_the_video_stays_dense(build):
    case = find("LTX-2")
    shapes = [(1, 128, 4, 4, 8), (1, 8, 128, 16)]
    conds = case.conds | dict(latent_shapes=shapes)
    case = replace(case, latent=(1, 1, 128 * 128 + 8 * 128 * 16), conds=conds)
    _, _, report, _ = generate(build(case), case, Recorder(-50.0))
    assert not report.calls
    assert any("can't be told apart" in reason for reason in report.reasons)


@pytest.mark.parametrize("name", ["HunyuanVideo", "Mochi", "Wan Fun with a reference"])
def test_conditionings_in_one_call_and_in_two_agree(build, name):
    """A batch of two conditionings computes the very tiles that two calls compute."""
    case = find(name)
    model = build(case)
    backend = ReferenceBackend(TileShape(TILE, TILE))
    (together, _, batched, _), (apart, _, single, _) = (
        generate(model, case, backend, streams) for streams in ([["a", "b"]], [["a"], ["b"]])
    )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    counts = [sorted((c.step, c.layer, c.computed) for c in r.calls) for r in (batched, single)]
    assert counts[0] == counts[1]
    assert batched.active


@pytest.mark.parametrize(
    ("module", "name", "why"),
    [
        ("ar_model", "CausalWanModel", "a cache of its own"),
        ("model_animate2", "WanAnimate2Model", "one frame at a time"),
    ],
)
def test_models_with_an_attention_of_their_own_stay_dense(module, name, why):
    model = type(name, (), {"__module__": f"comfy.ldm.wan.{module}", "patch_size": (1, 2, 2)})()
    assert why in describe_call(model, ModelCall((1, 16, 3, 8, 16), 12, {}))


def test_wan_animate_2_is_as_if_we_were_not_there(build):
    """Sampled by ComfyUI, with a pose and without."""
    import comfy.model_patcher

    from comfyui_liteattention.integrations.comfy.session import apply_patch, patch_of

    plain = comfy.model_patcher.ModelPatcher(build(ANIMATE_2), CPU, CPU)
    for extra in ({}, dict(pose_video_latent=noise((1, 16, 2, 8, 16), 5))):
        prompts = [[[noise(ANIMATE_2.text, seed), extra]] for seed in range(2)]
        patched = apply_patch(plain, Settings(**BOLD))
        dense, ours = (sample(m, ANIMATE_2, prompts=prompts) for m in (plain, patched))
        assert torch.equal(dense, ours)
        report = patch_of(patched).last_report
        assert not report.calls
        assert any("one frame at a time" in reason for reason in report.reasons)


def test_a_model_that_changed_stays_dense():
    model = type("WanModel", (), {"__module__": "comfy.ldm.wan.model"})()  # lacks everything
    reason = describe_call(model, ModelCall((1, 16, 3, 8, 16), 12, {}))
    assert reason.startswith("this version of WanModel is not understood")


def test_a_model_that_passes_no_call_on_is_said_to(build):
    """S2V of ComfyUI 0.3.75 calls its blocks without the options that hold the override."""
    from comfyui_liteattention.integrations.comfy.takers import NEVER_ASKED

    case = find("Wan S2V")
    _, seen, report, _ = generate(build(replace(case, since="0.3.75")), case, Recorder(-50.0))
    assert (NEVER_ASKED in report.reasons) == (not seen)
    assert bool(report.calls) == bool(seen)
