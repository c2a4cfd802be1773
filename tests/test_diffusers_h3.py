"""MiniMax H3 in diffusers by its own modular pipeline: its layout, its two schedules, its loop."""

import diffusers as d
import pytest
import torch
from tiny_families import tiny_h3

import comfyui_liteattention as lite

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not hasattr(d, "MiniMaxH3Transformer3DModel"), reason="this diffusers is older"
    ),
]

EAGER = dict(threshold=-0.1, criterion="gap", ramp=0, audit=0, min_tokens=0, never_slower=False)
TEXT, SOUND, VIDEO = 10, 2 * 207, 37 * 4 * 4  # tokens of 5 s, the shortest that it makes


@pytest.fixture
def pipe():
    """Without text encoder and decoder: takes text states and returns latents, as documented."""
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Blocks

    blocks = MiniMaxH3Blocks()
    for name in ("before_encode", "text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    torch.manual_seed(0)
    pipe.update_components(
        transformer=tiny_h3(24, 32, (1, 2, 2)).eval(),
        scheduler=d.MiniMaxH3Scheduler(shift=12.0),
        audio_scheduler=d.MiniMaxH3Scheduler(shift=3.0),
    )
    return pipe


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=torch.randn(1, TEXT, 16, generator=generator),
        text_token_tags=torch.ones(TEXT, dtype=torch.long),
        height=128,
        width=128,
        num_frames=124,
        num_inference_steps=5,
        generator=generator,
        output="latents",
    ).clone()


def test_its_modular_pipeline(pipe):
    """It samples one noise level fewer than it is asked for."""
    plain = sample(pipe)
    handle = lite.enable(pipe, **EAGER)
    first = sample(pipe)
    report = handle.report()
    assert report.active
    assert report.steps == 4
    assert not report.reasons
    assert {call.tokens for call in report.calls} == {TEXT + SOUND + VIDEO}
    assert [call.layer for call in report.calls] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
    ] * 4
    assert all(call.computed == call.total for call in report.calls if call.step == 0)
    assert torch.equal(sample(pipe), first)
    assert not torch.equal(first, plain)
    lite.disable(pipe)
    assert torch.equal(sample(pipe), plain)
