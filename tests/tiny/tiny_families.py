"""Tiny transformers of every family that we know in diffusers, of the real classes: see
tiny_sampling.py. Each is sampled by its real pipeline where that needs no encoders.
"""

import diffusers as d
import torch
from tiny_sampling import (
    GRID,
    STEPS,
    VIDEO,
    Made,
    given_first_frame,
    latent,
    loop,
    quiet,
    sharpen,
    texts,
    tokens,
)


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


def hunyuan_video_from_image():
    """The model takes the first frame as it is."""
    transformer = make_hunyuan(image_condition_type="token_replace")
    (text, _), (pooled, _) = texts(1, 20, 16), texts(1, 8)
    mask, guidance = torch.ones(1, 20), torch.tensor([6000.0])

    def step(x, t):
        return transformer(x, t, text, mask, pooled, guidance=guidance, return_dict=False)[0]

    sample = loop(transformer, latent(4), step)
    return Made(transformer, transformer, sample, 64 + 20, {"text"}, {VIDEO + 20}, given=slice(64))


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


def from_text(pipe):
    """Sampling by a pipeline of Wan's kind."""
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

    return sample


def wan():
    transformer = sharpen(d.WanTransformer3DModel(**WAN))
    scheduler = d.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = quiet(d.WanPipeline(None, None, None, scheduler, transformer))
    return Made(pipe, transformer, from_text(pipe), 0, {"cond", "uncond"}, {VIDEO})


def wan_from_image():
    """As Wan 2.2 5B does it: a noise level per token."""
    transformer = sharpen(d.WanTransformer3DModel(**WAN))
    text, _ = texts(1, 6, 16)

    def step(x, t):
        return transformer(x, given_first_frame(t), text, return_dict=False)[0]

    sample = loop(transformer, latent(4), step)
    return Made(transformer, transformer, sample, 64, {"text"}, {VIDEO}, given=slice(64))


def skyreels_v2():
    transformer = make_skyreels()
    scheduler = d.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    pipe = quiet(d.SkyReelsV2Pipeline(None, None, transformer, None, scheduler))
    return Made(pipe, transformer, from_text(pipe), 0, {"cond", "uncond"}, {VIDEO})


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
    start = torch.cat([tokens(), tokens()[:, :20]], dim=1)
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


def make_ltx_video():
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=16,
    )
    return sharpen(transformer)


def ltx_video():
    """One call for both conditionings; the scheduler alone tells the step."""
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    transformer = make_ltx_video()
    pipe = quiet(d.LTXPipeline(scheduler, None, None, None, transformer))
    text, negative = texts(1, 6, 16)
    mask = torch.ones(1, 6, dtype=torch.bool)

    def sample():
        return pipe(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            negative_prompt_embeds=negative,
            negative_prompt_attention_mask=mask,
            height=256,
            width=256,
            num_frames=25,
            latents=tokens(),
            num_inference_steps=STEPS,
            output_type="latent",
        ).frames

    return Made(pipe, transformer, sample, 0, {"cond_uncond x2"}, {VIDEO})


def ltx_video_from_image():
    """A noise level per token: the first frame is given."""
    transformer = make_ltx_video()
    text, _ = texts(1, 6, 16)
    sizes = dict(zip(("num_frames", "height", "width"), GRID, strict=True))

    def step(x, t):
        levels = given_first_frame(t)
        return transformer(x, text, levels, torch.ones(1, 6), **sizes, return_dict=False)[0]

    sample = loop(transformer, tokens(), step)
    return Made(transformer, transformer, sample, 64, {"text"}, {VIDEO}, given=slice(64))


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


def tiny_h3(channels, audio_channels, patch):
    """MiniMax H3's transformer for latents of so many channels, in patches of ``patch``."""
    return d.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=channels,
        audio_in_channels=audio_channels,
        patch_size=patch,
        text_dim=16,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=4,
    )


def minimax_h3():
    """One packed sequence: text, a given frame, sound, and then the video."""
    transformer = tiny_h3(4, 4, (1, 1, 1))
    (text, _), (sound, frame) = texts(1, 10, 16), texts(1, 64, 4)
    sound = sound[:, :12]
    before = 10 + 64 + 12
    picture = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    places = torch.zeros(before + VIDEO, 3)
    places[:10, 0] = torch.arange(10.0)
    places[10:74, 1:] = picture
    places[74:before, 0] = torch.arange(12.0)
    places[before:, 0] = torch.arange(4.0).repeat_interleave(64)
    places[before:, 1:] = picture.repeat(4, 1)
    tags = torch.tensor([1] * 10 + [0] * 64 + [2] * 12 + [0] * VIDEO)
    clean = torch.tensor([0] * 10 + [1] * 64 + [0] * (12 + VIDEO))
    videos = torch.cat([torch.arange(10, 74), torch.arange(before, before + VIDEO)])

    def step(x, t):
        # Its time goes from noise, 0, to the video, 1, and its velocity is the other way round.
        answer = transformer(
            torch.cat([frame, x], 1),
            sound,
            text,
            timestep=torch.cat([1 - t / 1000, torch.ones(1)]),
            timestep_indices=clean,
            token_tags=tags,
            position_ids=places,
            video_indices=videos,
            audio_indices=torch.arange(74, before),
            text_indices=torch.arange(10),
            return_dict=False,
        )[0]
        return -answer[:, 64:]

    sample = loop(sharpen(transformer), tokens(), step)
    dense = {"text"}
    return Made(
        transformer, transformer, sample, before, dense, {before + VIDEO}, given=slice(before)
    )


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


#: Sampled by their own pipelines, with CFG; by the names that docs/diffusers.md has for them.
SAMPLED = {
    "Wan": wan,
    "SkyReels V2": skyreels_v2,
    "HunyuanVideo": hunyuan_video,
    "HunyuanVideo 1.5": hunyuan_video_15,
    "LTX-Video": ltx_video,
    "CogVideoX": cogvideox,
    "Mochi": mochi,
    "Allegro": allegro,
}

#: Sampled by a loop, since their pipelines need more than the states of a text.
LOOPED = {
    "Wan with a given first frame": wan_from_image,
    "Wan VACE": wan_vace,
    "Wan Animate": wan_animate,
    "ChronoEdit": chrono_edit,
    "SkyReels V2 with diffusion forcing": skyreels_v2_diffusion_forcing,
    "HunyuanVideo with a given first frame": hunyuan_video_from_image,
    "FramePack": framepack,
    "LTX-Video with a given first frame": ltx_video_from_image,
    "LTX-2": ltx_2,
    "ConsisID": consis_id,
    "Cosmos": cosmos,
    "Cosmos with a given first frame": cosmos_from_video,
    "Kandinsky 5": kandinsky_5,
    "Motif-Video": motif_video,
    "Helios": helios,
    "EasyAnimate": easy_animate,
}
#: diffusers has it from this version on.
SINCE = {"MiniMax H3": "0.42"}
if hasattr(d, "MiniMaxH3Transformer3DModel"):
    LOOPED["MiniMax H3"] = minimax_h3

MODELS = SAMPLED | LOOPED
