"""Every family of video transformers that diffusers has: tiny ones of the real classes.

Each is sampled for a few steps, by its real pipeline where that needs no encoders. Weights are
random, but queries and keys are made alike, and the left half of the video looks different from the
right half: so that halves need not see each other, and there is something to skip.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers as d
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

import comfyui_liteattention as lite
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.integrations import diffusers_session
from comfyui_liteattention.integrations.diffusers_families import (
    FAMILIES,
    NOT_FOUND,
    self_attention,
    video_tokens,
)
from comfyui_liteattention.integrations.diffusers_masks import Padding, tail_padding
from comfyui_liteattention.integrations.diffusers_routes import ELSEWHERE
from comfyui_liteattention.integrations.diffusers_runs import Moment, Trajectory, noise_levels
from comfyui_liteattention.order import VideoTokens
from comfyui_liteattention.tiles import TileShape

TILE = 16
GRID = (4, 8, 8)  # tokens: frames, rows, columns
VIDEO = 4 * 8 * 8
BOLD = {"threshold": -1.0, "ramp": 0.0, "min_tokens": 0, "audit": 0, "never_slower": False}
NOTHING = BOLD | {"threshold": -39.0}
STEPS = 3
RESET = "_reset_stateful_cache"


class Made(NamedTuple):
    """One tiny model. ``sample()`` gives the result of one run. ``dense``: tokens that must never
    be skipped (text, given frames); ``streams``: names of the conditionings; ``kept``: tokens of
    each stream that are not padding; ``given``: where dense tokens lie among those that the
    model doesn't itself keep apart as text."""

    target: Any
    transformer: torch.nn.Module
    sample: Callable[[], torch.Tensor]
    dense: int
    streams: set[str]
    kept: set[int]
    layers: int = 2
    given: slice = slice(0, 0)


def latent(channels, scale=(1, 2, 2), frames=GRID[0]):
    """``[1, C, T, H, W]``: the left half of the picture is unlike the right half."""
    generator = torch.Generator().manual_seed(7)
    left, right = torch.randn(2, 1, channels, 1, 1, 1, generator=generator)
    sizes = (frames * scale[0], GRID[1] * scale[1], GRID[2] * scale[2])
    halves = torch.where(torch.arange(sizes[2]) < sizes[2] // 2, left, right)
    noise = torch.randn(1, channels, *sizes, generator=generator)
    return 3 * halves.expand(1, channels, *sizes) + 0.1 * noise


def texts(*shape):
    """Two prompts' states ``shape`` each."""
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(5)).unbind()


def sharpen(model, gain=1.4):
    """Make queries and keys alike, and far apart for unlike tokens."""
    with torch.no_grad():
        for name in self_attention(model, FAMILIES[type(model).__name__]):
            module = model.get_submodule(name)
            q, k = (getattr(module, n, None) or getattr(module, a) for n, a in PROJECTIONS)
            k.load_state_dict(q.state_dict())
            norms = [getattr(module, n, None) for n in NORMS]
            for part in [n for n in norms if n is not None] or [q, k]:
                part.weight.mul_(gain)
        for parameter in model.parameters():
            if not parameter.any():  # modulations that begin at zero would hide the attention
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model.eval()


PROJECTIONS = (("to_q", "to_query"), ("to_k", "to_key"))
NORMS = ("norm_q", "norm_k", "query_norm", "key_norm")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def loop(model, start, step):
    """Sampling without a pipeline: ``step(latent, t)`` in [0, 1000] is the model's answer."""

    @torch.no_grad()
    def sample():
        x = start.clone()
        for t in (900.0, 600.0, 300.0):
            x = x - 0.1 * step(x, torch.tensor([t]))
        if hasattr(model, RESET):  # as a pipeline does at its end
            getattr(model, RESET)()
        return x

    return sample


def make_hunyuan(**config):
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
        **config,
    )
    return sharpen(transformer)


def hunyuan_video():
    """Text of 20 and 9 tokens, padded to 24."""
    transformer = make_hunyuan()
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = quiet(d.HunyuanVideoPipeline(None, None, transformer, None, scheduler, None, None))
    text, negative = texts(1, 24, 16)
    pooled, negative_pooled = texts(1, 8)

    def sample():
        return pipe(
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            prompt_attention_mask=(torch.arange(24) < 20)[None],
            negative_prompt_embeds=negative,
            negative_pooled_prompt_embeds=negative_pooled,
            negative_prompt_attention_mask=(torch.arange(24) < 9)[None],
            true_cfg_scale=2.0,
            height=128,
            width=128,
            num_frames=13,
            latents=latent(4),
            num_inference_steps=STEPS,
            output_type="latent",
        ).frames

    return Made(pipe, transformer, sample, 20, {"cond", "uncond"}, {VIDEO + 20, VIDEO + 9})


def hunyuan_video_15():
    """Of image, glyph and prompt tokens only some are there; the padding sees nothing at all."""
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=16,
        text_embed_2_dim=8,
        rope_axes_dim=(8, 12, 12),
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    guider = d.ClassifierFreeGuidance(guidance_scale=2.0)
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    parts = (None, None, sharpen(transformer), vae, scheduler, None, None, guider)
    pipe = quiet(d.HunyuanVideo15Pipeline(*parts))
    (text, negative), (glyphs, no_glyphs) = texts(1, 12, 16), texts(1, 6, 8)

    def sample():
        return pipe(
            prompt_embeds=text,
            prompt_embeds_mask=(torch.arange(12) < 7)[None].long(),
            prompt_embeds_2=glyphs,
            prompt_embeds_mask_2=(torch.arange(6) < 2)[None].long(),
            negative_prompt_embeds=negative,
            negative_prompt_embeds_mask=(torch.arange(12) < 4)[None].long(),
            negative_prompt_embeds_2=no_glyphs,
            negative_prompt_embeds_mask_2=torch.zeros(1, 6).long(),
            height=128,
            width=128,
            num_frames=13,
            latents=latent(4),
            num_inference_steps=STEPS,
            output_type="latent",
        ).frames

    streams, kept = {"pred_cond", "pred_uncond"}, {VIDEO + 9, VIDEO + 4}
    return Made(pipe, transformer, sample, 9, streams, kept)


def cogvideox():
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=13,
        max_text_seq_length=10,
        use_rotary_positional_embeddings=True,
    )
    scheduler = d.CogVideoXDDIMScheduler()
    pipe = quiet(d.CogVideoXPipeline(None, None, None, sharpen(transformer), scheduler))
    text, negative = texts(1, 10, 16)

    def sample():
        return pipe(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            height=128,
            width=128,
            num_frames=13,
            latents=latent(4).transpose(1, 2),
            num_inference_steps=STEPS,
            output_type="latent",
        ).frames

    return Made(pipe, transformer, sample, 10, {"cond_uncond x2"}, {VIDEO + 10})


def mochi():
    """Attends row by row of the batch; 8 and 5 tokens of text. Its timesteps rise."""
    transformer = d.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=12,
    )
    torch.nn.init.normal_(transformer.pos_frequencies, std=0.01)
    scheduler = d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = quiet(d.MochiPipeline(scheduler, None, None, None, sharpen(transformer)))
    text, negative = texts(1, 12, 16)

    def sample():
        return pipe(
            prompt_embeds=text,
            prompt_attention_mask=(torch.arange(12) < 8)[None],
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=(torch.arange(12) < 5)[None],
            height=128,
            width=128,
            num_frames=19,
            latents=latent(4),
            num_inference_steps=4,  # the pipeline's schedule needs an even number
            output_type="latent",
        ).frames

    streams = {"cond_uncond", "cond_uncond row 1"}
    return Made(pipe, transformer, sample, 8, streams, {VIDEO + 5, VIDEO + 8})


def make_cosmos(channels):
    transformer = d.CosmosTransformer3DModel(
        in_channels=channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 16, 16),
    )
    return sharpen(transformer)


def cosmos():
    transformer = make_cosmos(4)
    (text, _), padding = texts(1, 6, 16), torch.zeros(1, 1, 16, 16)

    def step(x, t):
        return transformer(x, t / 1000, text, padding_mask=padding, return_dict=False)[0]

    sample = loop(transformer, latent(4), step)
    return Made(transformer, transformer, sample, 0, {"text"}, {VIDEO})


def cosmos_from_video():
    """The first frame is given, with a noise level of its own."""
    transformer = make_cosmos(5)
    (text, _), padding = texts(1, 6, 16), torch.zeros(1, 1, 16, 16)
    mask = torch.zeros(1, 1, *latent(4).shape[2:])
    mask[:, :, :1] = 1

    def step(x, t):
        levels = (t / 1000).view(1, 1, 1, 1, 1).repeat(1, 1, 4, 1, 1)
        levels[:, :, :1] = 1e-4
        options = {"condition_mask": mask, "padding_mask": padding, "return_dict": False}
        return transformer(x, levels, text, **options)[0]

    sample = loop(transformer, latent(4), step)
    return Made(transformer, transformer, sample, 64, {"text"}, {VIDEO}, given=slice(64))


def kandinsky_5():
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=64,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
        visual_cond=True,
    )
    (text, _), (pooled, _) = texts(1, 6, 16), texts(1, 8)
    given = torch.zeros(1, *latent(4).shape[2:], 5)  # a picture's latent, and where it is one
    given[:, :1, ..., -1] = 1

    def step(x, t):
        return transformer(
            torch.cat([x, given], dim=-1),
            text,
            t,
            pooled,
            [torch.arange(n) for n in GRID],
            torch.arange(6),
            return_dict=False,
        )

    sample = loop(sharpen(transformer, 1.0), latent(4).movedim(1, -1), step)
    return Made(transformer, transformer, sample, 64, {"text"}, {VIDEO}, given=slice(64))


def make_skyreels(**config):
    transformer = d.SkyReelsV2Transformer3DModel(**WAN, **config)
    return sharpen(transformer)


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
}


def skyreels_v2():
    transformer = make_skyreels()
    scheduler = d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    pipe = quiet(d.SkyReelsV2Pipeline(None, None, transformer, None, scheduler))
    text, negative = texts(1, 6, 16)

    def sample():
        return pipe(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            height=128,
            width=128,
            num_frames=13,
            latents=latent(4),
            num_inference_steps=STEPS,
            output_type="latent",
        ).frames

    return Made(pipe, transformer, sample, 0, {"cond", "uncond"}, {VIDEO})


def skyreels_v2_diffusion_forcing():
    """A noise level per frame: the first of them is given."""
    transformer = make_skyreels()
    text, _ = texts(1, 6, 16)

    def step(x, t):
        levels = t.expand(1, 4).clone()
        levels[:, 0] = 0
        return transformer(x, levels, text, enable_diffusion_forcing=True, return_dict=False)[0]

    sample = loop(transformer, latent(4), step)
    return Made(transformer, transformer, sample, 64, {"text"}, {VIDEO}, given=slice(64))


def allegro():
    transformer = d.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=96,
        sample_width=16,
        sample_height=16,
        sample_frames=4,
        caption_channels=16,
    )
    scheduler = d.EulerAncestralDiscreteScheduler()
    pipe = quiet(d.AllegroPipeline(None, None, None, sharpen(transformer), scheduler))
    text, negative = texts(1, 6, 16)
    mask = torch.ones(1, 6)

    def sample():
        return pipe(
            negative_prompt=None,
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=mask,
            height=128,
            width=128,
            num_frames=16,
            latents=latent(4),
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    return Made(pipe, transformer, sample, 0, {"text x2"}, {VIDEO})


def ltx_2():
    """Video and audio; 20 tokens of reference are appended to the video. Audio stays dense."""
    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=16,
        audio_cross_attention_dim=32,
        num_layers=2,
        caption_channels=16,
    )
    video = latent(4, (1, 1, 1)).flatten(2).transpose(1, 2)
    start = torch.cat([video, video[:, :20]], dim=1)
    (text, _), (audio, _) = texts(1, 6, 16), texts(1, 30, 4)
    coords = transformer.rope.prepare_video_coords(1, *GRID, torch.device("cpu"), fps=24.0)
    coords = torch.cat([coords, coords[:, :, :20]], dim=2)

    def step(x, t):
        return transformer(
            x,
            audio,
            text,
            text,
            t,
            num_frames=GRID[0],
            height=GRID[1],
            width=GRID[2],
            fps=24.0,
            audio_num_frames=30,
            video_coords=coords,
            return_dict=False,
        )[0]

    sample = loop(sharpen(transformer), start, step)
    return Made(
        transformer, transformer, sample, 20, {"text"}, {VIDEO + 20}, given=slice(-20, None)
    )


def wan_vace():
    """Two pictures of reference before four frames of video."""
    transformer = d.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=12)
    text, _ = texts(1, 6, 16)
    control = latent(12, frames=6)
    control[:, 4:, :2] = 0

    def step(x, t):
        return transformer(x, t, text, control_hidden_states=control, return_dict=False)[0]

    sample = loop(sharpen(transformer), latent(4, frames=6), step)
    return Made(
        transformer, transformer, sample, 128, {"text"}, {VIDEO + 128}, layers=3, given=slice(128)
    )


def wan_animate():
    """The picture of the character comes before four frames of video."""
    transformer = d.WanAnimateTransformer3DModel(
        **WAN | {"in_channels": 12},
        latent_channels=4,
        image_dim=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    (text, _), (image, _) = texts(1, 6, 16), texts(1, 2, 8)
    start = latent(12, frames=5)

    def step(x, t):
        out = transformer(
            x,
            t,
            text,
            image,
            latent(4),
            torch.zeros(1, 3, 13, 16, 16),
            return_dict=False,
        )[0]
        return out.repeat(1, 3, 1, 1, 1)

    sample = loop(sharpen(transformer), start, step)
    return Made(transformer, transformer, sample, 64, {"text"}, {VIDEO + 64}, given=slice(64))


def framepack():
    """One clean frame and some of the history before the video; picture and text after it."""
    transformer = d.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=False,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    (text, _), (pooled, _), (image, _) = texts(1, 12, 16), texts(1, 8), texts(1, 4, 8)

    def step(x, t):
        return transformer(
            x,
            t,
            text,
            (torch.arange(12) < 7)[None],
            pooled,
            image,
            torch.arange(4, 8),
            latents_clean=latent(4, frames=1),
            indices_latents_clean=torch.tensor([0]),
            latents_history_2x=latent(4, frames=2),
            indices_latents_history_2x=torch.tensor([1, 2]),
            latents_history_4x=latent(4, frames=4),
            indices_latents_history_4x=torch.tensor([0, 1, 2, 3]),
            return_dict=False,
        )[0]

    sample = loop(sharpen(transformer), latent(4), step)
    others = 64 + 16 + 4 + 4 + 7
    return Made(
        transformer, transformer, sample, others, {"text"}, {VIDEO + others}, given=slice(84)
    )


def motif_video():
    transformer = d.MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=16,
        rope_axes_dim=(8, 12, 12),
    )
    text, _ = texts(1, 12, 16)
    mask = (torch.arange(12) < 7)[None]

    def step(x, t):
        return transformer(x, t, text, mask, return_dict=False)[0]

    sample = loop(sharpen(transformer), latent(4), step)
    return Made(transformer, transformer, sample, 7, {"text"}, {VIDEO + 7})


def helios():
    """One frame of history before the video."""
    transformer = d.HeliosTransformer3DModel(**WAN, rope_dim=(8, 12, 12))
    text, _ = texts(1, 6, 16)

    def step(x, t):
        return transformer(
            x,
            t,
            text,
            indices_hidden_states=torch.arange(1, 5)[None],
            indices_latents_history_short=torch.zeros(1, 1),
            latents_history_short=latent(4, frames=1),
            return_dict=False,
        )[0]

    sample = loop(sharpen(transformer), latent(4), step)
    return Made(transformer, transformer, sample, 64, {"text"}, {VIDEO + 64}, given=slice(64))


def chrono_edit():
    transformer = d.ChronoEditTransformer3DModel(**WAN)
    text, _ = texts(1, 6, 16)

    def step(x, t):
        return transformer(x, t, text, return_dict=False)[0]

    sample = loop(sharpen(transformer), latent(4), step)
    return Made(transformer, transformer, sample, 0, {"text"}, {VIDEO})


def consis_id():
    transformer = d.ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=16,
        sample_height=16,
        sample_frames=13,
        max_text_seq_length=10,
    )
    text, _ = texts(1, 10, 16)

    def step(x, t):
        return transformer(x, text, t, return_dict=False)[0]

    sample = loop(sharpen(transformer), latent(4).transpose(1, 2), step)
    return Made(transformer, transformer, sample, 10, {"text"}, {VIDEO + 10})


def easy_animate():
    transformer = d.EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
    )
    text, _ = texts(1, 10, 16)

    def step(x, t):
        return transformer(x, t, encoder_hidden_states=text, return_dict=False)[0]

    sample = loop(sharpen(transformer), latent(4), step)
    return Made(transformer, transformer, sample, 10, {"text"}, {VIDEO + 10})


MODELS = (
    hunyuan_video,
    hunyuan_video_15,
    cogvideox,
    mochi,
    cosmos,
    cosmos_from_video,
    kandinsky_5,
    skyreels_v2,
    skyreels_v2_diffusion_forcing,
    allegro,
    ltx_2,
    wan_vace,
    wan_animate,
    framepack,
    motif_video,
    helios,
    chrono_edit,
    consis_id,
    easy_animate,
)


class Recorder(ReferenceBackend):
    """Small tiles; keeps, of every call that skips, which rows came out other than dense."""

    def __init__(self):
        super().__init__(TileShape(TILE, TILE))
        self.changed = []

    def forward(self, q, k, v, scale, lists=None, criterion=None):
        result = super().forward(q, k, v, scale, lists, criterion)
        if lists is not None:
            full = super().forward(q, k, v, scale)
            self.changed.append((result.out != full.out).any(-1).any(0).any(0))
        return result


@pytest.fixture
def recorder(monkeypatch):
    backend = Recorder()
    monkeypatch.setattr(diffusers_session, "backend_for", lambda device: backend)
    return backend


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Witness:
    """Repeats every call of self-attention densely: how far each row of the output is off.

    Joint attention returns video and text apart, so that the model says which is which. ``text``
    and ``video`` hold, per call, the largest difference among rows of their kind.
    """

    def __init__(self, made):
        self.given = made.given
        self.text, self.video = [], []
        family = FAMILIES[type(made.transformer).__name__]
        for name in self_attention(made.transformer, family):
            module = made.transformer.get_submodule(name)
            module.register_forward_hook(self._compare, with_kwargs=True)

    def _compare(self, module, args, kwargs, output):
        dense = module._diffusers_hook.hooks["liteattention"].fn_ref.original_forward
        pairs = zip(parts(output), parts(dense(*args, **kwargs)), strict=True)
        video, *text = ((a - b).abs().amax((0, 2)) for a, b in pairs)
        is_video = torch.ones(len(video), dtype=torch.bool)
        is_video[self.given] = False
        self.text.append(float(torch.cat([video[~is_video], *text, torch.zeros(1)]).max()))
        self.video.append(float(video[is_video].max()))


def parts(output):
    return [t for t in output if t is not None] if isinstance(output, tuple) else [output]


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def made(request):
    torch.manual_seed(0)
    return request.param()


def hooks_left(model):
    registries = [m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook")]
    return [
        *model._forward_hooks,
        *model._forward_pre_hooks,
        *(name for registry in registries for name in registry.hooks),
        *(name for name in vars(model) if "lite" in name or name == RESET),
    ]


def named(streams):
    """Streams that are named by a prompt's fingerprint are just "text" here."""
    return {"text" + s[21:] if s.startswith("text-") else s for s in streams}


def test_model(made, recorder):
    plain = made.sample()
    assert torch.isfinite(plain).all()

    # Nothing is negligible: the plain result, but for rounding.
    session = lite.enable(made.target, **NOTHING)
    torch.testing.assert_close(made.sample(), plain, rtol=1e-4, atol=1e-4)
    report = session.report()
    assert report.computed_fraction == 1 and report.reasons == {}
    assert named({c.stream for c in report.calls}) == made.streams
    assert len({c.layer for c in report.calls}) == made.layers
    steps = {c.step for c in report.calls}
    assert len(report.calls) == made.layers * len(steps) * len(made.streams)
    assert steps == set(range(len(steps))) and len(steps) >= STEPS
    assert {c.tokens for c in report.calls} == made.kept

    # The halves of the video are negligible for each other.
    recorder.changed.clear()
    session = lite.enable(made.target, **BOLD)
    bold = made.sample()
    report = session.report()
    assert report.active and report.computed_fraction < 0.9
    assert recorder.changed and any(rows.any() for rows in recorder.changed)
    for tile_map in report.maps:
        # What is not video is listed first: the longest text, or less.
        dense = made.dense - (max(made.kept) - tile_map.tokens)
        tiles = -(-dense // TILE)
        assert bool((tile_map.live[:tiles] == 1).all() and (tile_map.live[:, :tiles] == 1).all())
    fewest = made.dense - (max(made.kept) - min(made.kept))
    assert not any(rows[:fewest].any() for rows in recorder.changed)
    assert session._trajectory is None  # the run's state went with it
    assert torch.equal(made.sample(), bold)

    lite.disable(made.target)
    assert torch.equal(made.sample(), plain)
    assert hooks_left(made.transformer) == []
    assert "liteattention" not in map(str, _AttentionBackendRegistry._backends)


def test_text_and_given_frames_are_dense(made, recorder):
    lite.enable(made.target, **BOLD)
    witness = Witness(made)
    made.sample()
    assert max(witness.text) < 1e-5
    assert max(witness.video) > 1e-4


@torch.no_grad()
def call_hunyuan(model, kept, seed=0, t=500.0):
    """One call with prompts of ``kept[b]`` tokens, padded to 24."""
    text = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(seed))[: len(kept)]
    return model(
        latent(4).expand(len(kept), -1, -1, -1, -1),
        torch.full((len(kept),), t),
        text,
        torch.arange(24) < torch.tensor(kept)[:, None],
        torch.zeros(len(kept), 8),
        guidance=torch.full((len(kept),), 6000.0),
        return_dict=False,
    )[0]


def test_prompts_of_different_lengths_in_one_batch(recorder):
    """Each row of the batch keeps its own tokens, and gives what it gives alone."""
    model = make_hunyuan()
    plain = call_hunyuan(model, (20, 9))
    session = lite.enable(model, **NOTHING)
    torch.testing.assert_close(call_hunyuan(model, (20, 9)), plain, rtol=1e-4, atol=1e-4)
    report = session.report()
    assert report.reasons == {}
    rows = {(c.stream[-5:], c.tokens) for c in report.calls}
    assert rows == {("row 0", VIDEO + 20), ("row 1", VIDEO + 9)}
    lite.enable(model, **BOLD)
    both = [call_hunyuan(model, (20, 9), t=t) for t in (900.0, 500.0)]
    lite.enable(model, **BOLD)
    alone = [call_hunyuan(model, (20,), t=t) for t in (900.0, 500.0)]
    for pair, one in zip(both, alone, strict=True):
        torch.testing.assert_close(pair[:1], one, rtol=1e-4, atol=1e-4)


def test_prompts_of_one_length_share_a_call(recorder):
    model = make_hunyuan()
    session = lite.enable(model, **NOTHING)
    call_hunyuan(model, (9, 9))
    assert [c.stream[-3:] for c in session.report().calls] == [" x2", " x2"]


def test_a_replaced_first_frame_is_pinned(recorder):
    model = make_hunyuan(image_condition_type="token_replace")
    session = lite.enable(model, **BOLD)
    for t in (900.0, 500.0):
        call_hunyuan(model, (20,), t=t)
    report = session.report()
    assert report.active and "dense_keys=((0, 64),)" in report.settings
    tiles = (64 + 20) // TILE
    assert all(bool((m.live[:tiles] == 1).all()) for m in report.maps)


def test_vace_without_references_pins_nothing():
    family = FAMILIES["WanVACETransformer3DModel"]
    model = d.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=12)
    control = latent(12)
    assert family.given({"control_hidden_states": control}, model.config) == 0
    control[:, 4:8, 1:] = 0  # no picture to change in later frames, but a mask that says so
    assert family.given({"control_hidden_states": control}, model.config) == 0
    assert family.given({}, model.config) == 0


def test_a_mask_over_video_stays_dense(recorder):
    """SkyReels' blocks of frames see only those before them."""
    torch.manual_seed(0)
    model, (text, _) = make_skyreels(num_frame_per_block=2), texts(1, 6, 16)
    with torch.no_grad():
        plain = model(latent(4), torch.tensor([500.0]), text, return_dict=False)[0]
        session = lite.enable(model, **BOLD)
        out = model(latent(4), torch.tensor([500.0]), text, return_dict=False)[0]
    assert torch.equal(out, plain)
    assert session.report().reasons == {"an attention mask": 2}


def test_a_backend_that_is_set_for_all_models_is_used(recorder):
    """Cosmos dispatches to it past its processors, so that nothing comes to us."""
    torch.manual_seed(0)
    made = cosmos()
    plain = made.sample()
    name = AttentionBackendName._NATIVE_MATH
    seen = []

    def other(query, key, value, **options):
        seen.append(query.shape)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return (torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)

    before = _AttentionBackendRegistry._backends[name]
    session = lite.enable(made.target, **BOLD)
    _AttentionBackendRegistry._backends[name] = other
    try:
        with d.attention_backend("_native_math"):
            out = made.sample()
    finally:
        _AttentionBackendRegistry._backends[name] = before
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
    assert seen and session.report().reasons == {ELSEWHERE: 6}


def test_what_is_declined_is_left_to_pytorch(recorder):
    """Bit for bit, with nothing of ours around it afterwards."""
    torch.manual_seed(0)
    made = cogvideox()
    plain = made.sample()
    session = lite.enable(made.target, threshold=-1.0)  # too few tokens
    assert torch.equal(made.sample(), plain)
    assert list(session.report().reasons) == ["short sequence (fewer than 2048 tokens)"]
    assert torch.overrides._get_current_function_mode_stack() == []


def test_steps_are_found_in_bfloat16():
    """Neighbours coincide, and are still one step after the other."""
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(50)
    told = scheduler.timesteps.bfloat16()
    assert len(set(told.tolist())) < 50
    trajectory, steps = None, []
    for t in told:
        levels = noise_levels(scheduler, float(t), t.dtype)
        now = Moment("cond", None, None, float(t), scheduler.timesteps, levels)
        if trajectory is None:
            trajectory = Trajectory(now)
        else:
            assert trajectory.continues("transformer", now)
        steps.append(trajectory.advance("transformer", now).step)
    assert steps == list(range(50)) and trajectory.countdown() == range(50, -1, -1)


def test_noise_levels_in_the_form_that_a_model_is_told():
    scheduler = d.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sigma = scheduler.sigmas[1]
    for level in (scheduler.timesteps[1], sigma, sigma / (sigma + 1)):
        levels = noise_levels(scheduler, float(level), torch.float32)
        assert len(levels) == 4 and levels.index(float(level)) == 1
    assert noise_levels(scheduler, 123.0, torch.float32) == ()
    assert noise_levels(None, 1000.0, torch.float32) == ()


def padding_masks():
    """(mask for 2 rows of 6 tokens, what it is)."""
    keys = torch.arange(6) < torch.tensor([[4], [6]])
    pairs = keys[:, :, None] & keys[:, None]
    yield keys[:, None, None], Padding((4, 6), False)
    yield keys[:1, None, None], Padding((4, 4), False)
    yield pairs[:, None], Padding((4, 6), True)
    yield keys.flip(1)[:, None, None], None  # at the head
    yield pairs[:, None] & torch.ones(6, 6, dtype=torch.bool).tril(), None  # causal
    yield keys[:, None, None].float(), None
    yield keys[:, None, None] & False, None
    yield pairs[:, None, :3], None
    yield keys, None
    yield pairs[:, None].expand(2, 3, 6, 6), None


@pytest.mark.parametrize(("mask", "padding"), padding_masks())
def test_padding_masks(mask, padding):
    assert tail_padding(mask, 2, 6) == padding


@pytest.mark.parametrize("make", [hunyuan_video, cogvideox], ids=lambda make: make.__name__)
def test_compiled(make, recorder):
    """Both ways to our attention lie outside the compiled graph."""
    torch.manual_seed(0)
    made = make()
    session = lite.enable(made.target, **BOLD)
    eager = made.sample()
    made.transformer.compile(backend="eager")
    assert torch.equal(made.sample(), eager)
    assert session.report().active and session.report().reasons == {}


def test_a_sequence_too_short_for_its_video():
    family = FAMILIES["HunyuanVideoTransformer3DModel"]
    assert video_tokens(family, {}, GRID, VIDEO) == VideoTokens(GRID)
    assert video_tokens(family, {}, GRID, VIDEO - 1) == NOT_FOUND


@pytest.mark.parametrize("make", [hunyuan_video, cogvideox], ids=lambda make: make.__name__)
@pytest.mark.parametrize("cache_first", [True, False])
def test_a_cache_on_the_same_modules(make, recorder, cache_first):
    """Pyramid Attention Broadcast leaves out calls. Each may come first, and go first."""
    torch.manual_seed(0)
    made = make()
    pipe, model = made.target, made.transformer
    plain = made.sample()

    def enable_cache():
        config = d.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
        model.enable_cache(config)

    enable_cache()
    cached = made.sample()
    model.disable_cache()
    assert torch.equal(made.sample(), plain) and not torch.equal(cached, plain)

    if cache_first:
        enable_cache()
    session = lite.enable(pipe, **NOTHING)
    if not cache_first:
        enable_cache()
    torch.testing.assert_close(made.sample(), cached, rtol=1e-4, atol=1e-4)
    everything = made.layers * STEPS * len(made.streams)
    assert 0 < len(session.report().calls) < everything and session.report().reasons == {}
    if cache_first:
        model.disable_cache()
        torch.testing.assert_close(made.sample(), plain, rtol=1e-4, atol=1e-4)
        assert len(session.report().calls) == everything
        lite.disable(pipe)
    else:
        lite.disable(pipe)
        assert torch.equal(made.sample(), cached)
        model.disable_cache()
    assert torch.equal(made.sample(), plain)
    assert hooks_left(model) == []
