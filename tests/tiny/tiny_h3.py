"""MiniMax H3 as tiny as it gets, 12 text, 74 audio and 168 video tokens, with and without what else
its packed sequence can hold."""

from functools import partial

from comfy_case import Case, made, noise

VIDEO, AUDIO = (1, 24, 7, 8, 12), (1, 32, 2, 37)
TEXT = (1, 12, 32)
H3 = dict(image_model="minimax_h3", hidden_size=64, num_layers=3, token_refiner_num_layers=2)
H3 |= dict(num_attention_heads=2, attention_head_dim=64, ffn_hidden_size=64, latents_dim=24)
H3 |= dict(audio_latents_dim=32, text_dim=32, timestep_input_dim=16, rope_inv_freq_len=8)
H3 |= dict(time_embed_hidden_size=32, time_embed_dim=16)


def _keyframes():
    """A first and a last frame, and a little sound: 24 + 24 + 10 tokens."""
    frame = dict(latent=(1, 24, 1, 8, 12))
    yield dict(resolved_frame_index=0, **frame, audio_latent=(1, 32, 2, 5))
    yield dict(resolved_frame_index=21, **frame, audio_latent=None)


def _references():
    """An image, some sound, and a video with sound: 16 + 6 + 4 + 8 tokens."""
    image = dict(kind="image", latent_t=1, latent_h=8, latent_w=8, ref_audio_t=0)
    yield dict(image, latent=(1, 24, 1, 8, 8), audio_latent=None)
    yield dict(kind="audio", ref_audio_t=3, audio_latent=(1, 32, 2, 3))
    video = dict(kind="video_audio", latent_t=2, latent_h=4, latent_w=4, ref_audio_t=2)
    yield dict(video, latent=(1, 24, 2, 4, 4), audio_latent=(1, 32, 2, 2))


def _made(descriptions):
    return [{name: made(value) for name, value in one.items()} for one in descriptions()]


def payload(keyframes=None, refs=None):
    """What ComfyUI's ``extra_conds`` packs for the model."""
    from comfy.ldm.minimax.model import PackedLayout

    given = keyframes or refs or []
    layout = PackedLayout(TEXT[1], *VIDEO[2:], AUDIO[3], keyframes=keyframes, refs=refs)
    packed = dict(layout=layout, keyframes=keyframes, refs=refs, seed=0, audio_scale=1.0)
    for kind, name in (("cond_video_latents", "latent"), ("cond_audio_latents", "audio_latent")):
        packed[kind] = [one[name] for one in given if one.get(name) is not None]
    return packed


def _case(name, before=0, **packed):
    latent = (1, 1, noise(VIDEO, 0).numel() + noise(AUDIO, 0).numel())
    conds = dict(latent_shapes=[VIDEO, AUDIO])
    conds["minimax_payload"] = lambda: payload(**{n: _made(of) for n, of in packed.items()})
    sequence = dict(latent=latent, text=TEXT, before=12 + before + 74, video=168, layers=3)
    return Case(name, "MiniMaxH3", H3, conds=conds, since="0.33", **sequence)


H3_CASES = [
    _case("MiniMax H3"),
    _case("MiniMax H3 with keyframes", 58, keyframes=_keyframes),
    _case("MiniMax H3 with references", 34, refs=_references),
]
#: What nodes put into its conditioning.
H3_SAMPLED = {
    "MiniMax H3": {},
    "MiniMax H3 with keyframes": dict(minimax_keyframes=partial(_made, _keyframes)),
    "MiniMax H3 with references": dict(minimax_refs=partial(_made, _references)),
}
