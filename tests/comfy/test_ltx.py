"""LTX-2.3 and 2.5 as their templates and their guiders run them, by ComfyUI's own nodes: two stages
with sound and guides, passes with something left out. A backend that finds everything negligible
shows who shares tiles with whom: each stream of each run has a first call that is dense."""

from collections import Counter

import pytest
import tiny_comfy
import torch
from ltx_guiders import MULTIMODAL, STG, make_guider
from packaging.version import parse
from recorder import Recorder

from comfyui_liteattention.settings import Settings

WEIGHTED = "LTX guides with a strength other than 1, or a mask: they mask the video's attention"
pytestmark = pytest.mark.usefixtures("one_thread", "comfy")

NAMES = ["LTX-2.3", "LTX-2.5"]
FIRST = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]
SECOND = [0.85, 0.725, 0.421875, 0.0]
SIZE = (4, 4, 8)  # of the video's latent in the first stage
SOUND = (1, 8, 20, 16)
LAYERS = 3
SKIPS = Settings(threshold=-1.0, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False)
OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="module", params=NAMES)
def plain(request, comfy):
    case = tiny_comfy.find(request.param)
    if tiny_comfy.version() < parse(case.since):
        pytest.skip(f"{case.name} needs ComfyUI {case.since}")
    return tiny_comfy.make_patcher(case)


@pytest.fixture
def patched(plain, monkeypatch):
    """The MODEL behind our node; ``declined``: lengths of queries and keys that were left to what
    attends beside us."""
    from comfyui_liteattention.integrations.comfy import session

    monkeypatch.setattr(session, "_backend", lambda *_: Recorder(-50.0))
    model, declined = plain.clone(), set()

    def before(func, q, k, *args, **kwargs):
        declined.add((q.shape[1], k.shape[1]))
        return func(q, k, *args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE] = before
    model = session.apply_patch(model, SKIPS)
    model.declined = declined
    return model


def prompts():
    return [[[tiny_comfy.noise((1, 12, 64), seed), {}]] for seed in (1, 2)]


def report_of(model):
    from comfyui_liteattention.integrations.comfy.session import patch_of

    return patch_of(model).last_report


def sampled(guider, latent, sigmas, sampler="euler"):
    """A pass of a template: RandomNoise, KSamplerSelect, ManualSigmas, SamplerCustomAdvanced."""
    from comfy.samplers import sampler_object
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    given = Noise_RandomNoise(7), guider, sampler_object(sampler), torch.tensor(sigmas)
    with torch.inference_mode():
        return SamplerCustomAdvanced.execute(*given, latent).result[0]


def with_sound(video, sound=None, mask=None):
    from comfy_extras.nodes_lt import LTXVConcatAVLatent

    video = {"samples": video} if mask is None else {"samples": video, "noise_mask": mask}
    sound = {"samples": torch.zeros(SOUND)} if sound is None else sound
    return LTXVConcatAVLatent.execute(video, sound).result[0]


def guider_of(model, positive, negative, name):
    """What the templates connect: 2.3 the usual guider, 2.5 one with a scale for each stream."""
    from comfy_extras import nodes_custom_sampler, nodes_lt

    if name == "LTX-2.3":
        return nodes_custom_sampler.CFGGuider.execute(model, positive, negative, 1.0).result[0]
    return nodes_lt.LTXVDualCFGGuider.execute(model, positive, negative, 1.0, 1.0).result[0]


def assert_streams_begin_dense(report):
    """The calls of the first step, and no later one: no stream goes on with another one's tiles, or
    loses its own."""
    for call in report.calls:
        assert (call.computed == call.total) == (call.step == 0), call


@pytest.mark.parametrize("guided", [False, True])
def test_the_two_stages_of_the_templates(request, plain, patched, guided):
    """8 steps at half the size, the latent twice as large, 3 steps; with a guide frame, too, which
    is appended and cut off again."""
    from comfy_extras.nodes_lt import LTXVAddGuide, LTXVCropGuides, LTXVSeparateAVLatent

    name = request.node.callspec.params["plain"]
    sampler = {"LTX-2.3": "euler", "LTX-2.5": "euler_ancestral"}[name]

    def generate(model):
        (positive, negative), reports, sound = prompts(), [], None
        video = torch.zeros(1, 128, *SIZE)
        for sigmas in (FIRST, SECOND):
            cond, mask, frames = (positive, negative), None, video
            if guided:
                one = tiny_comfy.noise((1, 128, 1, *video.shape[3:]), 3)
                mask = torch.ones(1, 1, *video.shape[2:])
                guide = (8, video, mask, one, 1.0, (8, 32, 32))
                *cond, frames, mask = LTXVAddGuide.append_keyframe(positive, negative, *guide)
            guider = guider_of(model, *cond, name)
            done = sampled(guider, with_sound(frames, sound, mask), sigmas, sampler)
            video, sound = LTXVSeparateAVLatent.execute(done).result
            if guided:
                video = LTXVCropGuides.execute(*cond, video).result[2]
            video = video["samples"]
            reports.append(report_of(model) if model is patched else None)
            if sigmas is FIRST:  # as the upscaler does, between two runs
                video = torch.nn.functional.interpolate(video, scale_factor=(1, 2, 2))
        return video, sound["samples"], reports

    want = generate(plain)
    *got, reports = generate(patched)
    for sigmas, tokens, report in zip((FIRST, SECOND), (128, 512), reports, strict=True):
        tokens += guided * tokens // SIZE[0]
        assert {c.tokens for c in report.calls} == {tokens}
        assert {c.layer for c in report.calls} == {"0", "1", "2"}
        assert {c.stream for c in report.calls} == {"positive"}
        assert len(report.calls) == (len(sigmas) - 1) * LAYERS
        assert_streams_begin_dense(report)
        # Sound, text, and each of them to the other: as if we were not there.
        assert (20, 20) in patched.declined
        assert {(tokens, 12), (tokens, 20), (20, tokens)} <= patched.declined
        assert (tokens, tokens) not in patched.declined
    for ours, dense in zip(got, want, strict=False):
        assert ours.shape == dense.shape
        assert ours.isfinite().all()
    assert not torch.equal(got[0], want[0])


class PlainVae:
    """Of the templates' VAE, what LTXVAddGuide asks for."""

    downscale_index_formula = (8, 32, 32)

    def encode(self, pixels):
        return tiny_comfy.noise((1, 128, 1, pixels.shape[1] // 32, pixels.shape[2] // 32), 3)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_first_and_last_frame(request, plain, patched, strength):
    """One pass at full size, by the node of the templates. Those ask for a strength of 0.7, for
    which ComfyUI masks the attention: it stays dense, with one sentence."""
    from comfy_extras.nodes_lt import LTXVAddGuide

    name = request.node.callspec.params["plain"]
    frames, rows, columns = SIZE

    def generate(model):
        positive, negative = prompts()
        latent = {"samples": torch.zeros(1, 128, frames, 2 * rows, 2 * columns)}
        image = torch.zeros(1, 64 * rows, 64 * columns, 3)
        for frame in (0, -1):
            given = positive, negative, PlainVae(), latent, image, frame, strength
            positive, negative, latent = LTXVAddGuide.execute(*given).result
        given = with_sound(latent["samples"], mask=latent["noise_mask"])
        guider = guider_of(model, positive, negative, name)
        return sampled(guider, given, FIRST, "euler_ancestral")["samples"].unbind()

    want, got = generate(plain), generate(patched)
    report = report_of(patched)
    if strength == 1.0:
        assert {call.tokens for call in report.calls} == {(frames + 2) * 4 * rows * columns}
        assert len(report.calls) == (len(FIRST) - 1) * LAYERS
        assert_streams_begin_dense(report)
    else:
        assert not report.calls
        assert next(iter(report.reasons)) == WEIGHTED
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("declined", [False, True])
def test_cores_guidance(plain, patched, declined):
    """STG, modality guidance, and two scales of CFG: four passes an evaluation."""
    from comfy_extras import nodes_lt

    from comfyui_liteattention.integrations.comfy.session import apply_patch

    def guided(model):
        model = nodes_lt.LTXVSpatioTemporalGuidance.execute(model, 1.0, "1", 0.0, 1.0).result[0]
        model = nodes_lt.LTXVModalityGuidance.execute(model, 3.0, 0.0, 1.0).result[0]
        guider = nodes_lt.LTXVDualCFGGuider.execute(model, *prompts(), 3.0, 7.0).result[0]
        done = sampled(guider, with_sound(torch.zeros(1, 128, *SIZE)), FIRST)
        return done["samples"].unbind(), model

    if declined:
        short = apply_patch(plain, Settings(min_tokens=10**6))
        for ours, dense in zip(guided(short)[0], guided(plain)[0], strict=True):
            assert torch.equal(ours, dense)
        return
    _, model = guided(patched)
    assert_passes(report_of(model), [LAYERS, LAYERS, LAYERS - 1, LAYERS])
    assert (128, 128) not in patched.declined


@pytest.mark.parametrize(
    ("passes", "layers", "perturbed"),
    [
        (STG, [LAYERS, LAYERS, LAYERS - 1], 1),
        (MULTIMODAL, [LAYERS, LAYERS, LAYERS - 1, LAYERS], 2),
    ],
)
def test_the_guiders_of_lightricks(patched, passes, layers, perturbed):
    guider = make_guider(patched, passes, perturbed=[1])
    guider.set_conds(*prompts())
    sampled(guider, with_sound(torch.zeros(1, 128, *SIZE)), FIRST)
    report = report_of(patched)
    assert_passes(report, layers)
    others = {f"positive, guidance pass {number + 1}" for number in range(perturbed)}
    assert {call.stream for call in report.calls} == {"positive", "negative", *others}


def test_evaluations_that_leave_the_video_alone(patched):
    """Nothing of the video is asked then; the tiles wait for the next one."""
    guider = make_guider(patched, MULTIMODAL, perturbed=[1], without_video=(3, 4))
    guider.set_conds(*prompts())
    sampled(guider, with_sound(torch.zeros(1, 128, *SIZE)), FIRST)
    report = report_of(patched)
    assert {c.step for c in report.calls} == {0, 1, 2, 5, 6, 7}
    assert_streams_begin_dense(report)


def assert_passes(report, layers):
    """So many passes with so many layers in each step; in one of fewer, block 1 is left out."""
    first = Counter(call.layer for call in report.calls if call.step == 0)
    assert first == {"0": len(layers), "1": layers.count(LAYERS), "2": len(layers)}
    assert len(report.calls) == sum(layers) * (len(FIRST) - 1)
    assert_streams_begin_dense(report)
