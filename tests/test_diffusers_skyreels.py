"""SkyReels V2 by its own diffusion-forcing pipeline: each frame has a noise level of its own, and
with ``ar_step`` later frames lag behind, so that a run has more steps than noise levels."""

import logging

import diffusers as d
import pytest
import torch
from tiny_families import make_skyreels
from tiny_sampling import quiet, texts

import comfyui_liteattention as lite
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.integrations.diffusers import session as diffusers_session
from comfyui_liteattention.tiles import TileShape

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LAYERS = 4, 2
BOLD = {"threshold": -1.0, "ramp": 0.0, "min_tokens": 0, "audit": 0, "never_slower": False}
NOTHING = BOLD | {"threshold": -39.0}
#: Steps of four latent frames that begin so many steps after one another.
LATE = {0: STEPS, 1: STEPS + 3, 2: STEPS + 6}


@pytest.fixture
def pipe(monkeypatch):
    backend = ReferenceBackend(TileShape(16, 16))
    monkeypatch.setattr(diffusers_session, "backend_for", lambda *_: backend)
    torch.manual_seed(0)
    scheduler = d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    parts = (None, None, make_skyreels(), None, scheduler)
    return quiet(d.SkyReelsV2DiffusionForcingPipeline(*parts))


def sample(pipe, **options):
    text, negative = texts(1, 6, 16)
    return pipe(
        None,
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=STEPS,
        output_type="latent",
        **{"num_frames": 13, **options},
    ).frames


@pytest.mark.parametrize("ar_step", LATE)
def test_frames_that_lag_behind_are_one_run(pipe, ar_step, caplog):
    caplog.set_level(logging.INFO)
    plain = sample(pipe, ar_step=ar_step)
    h = lite.enable(pipe, **BOLD)
    first = sample(pipe, ar_step=ar_step)
    assert [record.levelname for record in caplog.records] == ["INFO"], caplog.text
    report = h.report()
    assert report.active and report.reasons == {}
    assert report.settings == "threshold=-1.0, ramp=0.0, audit=0, min_tokens=0, never_slower=False"
    assert {call.stream for call in report.calls} == {"cond", "uncond"}
    assert len(report.calls) == LATE[ar_step] * LAYERS * 2
    assert all(call.computed == call.total for call in report.calls[: LAYERS * 2])
    assert torch.equal(sample(pipe, ar_step=ar_step), first)
    lite.enable(pipe, **NOTHING)
    torch.testing.assert_close(sample(pipe, ar_step=ar_step), plain, rtol=1e-4, atol=1e-4)
    lite.disable(pipe)
    assert torch.equal(sample(pipe, ar_step=ar_step), plain)


def test_blocks_of_frames_are_attended_with_a_mask_and_stay_dense(pipe, caplog):
    """As its authors recommend with ``ar_step``: later blocks are hidden from earlier ones."""
    caplog.set_level(logging.INFO)
    plain = sample(pipe, ar_step=2, causal_block_size=2)
    h = lite.enable(pipe, **BOLD)
    assert torch.equal(sample(pipe, ar_step=2, causal_block_size=2), plain)
    assert h.report().reasons == {"an attention mask": (STEPS + 2) * LAYERS * 2}
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "LiteAttention: calls stay dense: an attention mask",
        "LiteAttention inactive: an attention mask",
    ]


def test_a_longer_video_is_a_run_for_each_of_its_pieces(pipe, caplog):
    """The end of the piece before is given to the next one, and is never skipped there."""
    caplog.set_level(logging.INFO)
    h = lite.enable(pipe, **BOLD)
    sample(pipe, num_frames=21, overlap_history=5, base_num_frames=13)
    assert len(caplog.records) == 2, caplog.text
    assert "dense_keys=((0, 128),)" in h.report().settings
