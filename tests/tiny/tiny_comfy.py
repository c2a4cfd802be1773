"""Every family of models that ComfyUI has, as tiny as it gets: how they are made and sampled."""

import importlib

import torch
from comfy_case import NEWER, Case, made, noise, version
from tiny_h3 import H3_CASES, H3_SAMPLED

from demo.comfy_server import REPOSITORY, WEIGHTS

WAN = dict(image_model="wan2.1", dim=128, num_heads=2, num_layers=3, ffn_dim=64, text_dim=32)
WAN |= dict(freq_dim=32, in_dim=16, out_dim=16)
LATENT = (1, 16, 3, 8, 16)
CALL = dict(latent=LATENT, text=(1, 12, 32), video=96)  # 3 x 4 x 8 tokens


def wan(name, config, model_type, layers=3, unet=None, **others):
    return Case(
        name, config, WAN | {"model_type": model_type} | (unet or {}), layers=layers, **others
    )


def wan_cases():
    image = dict(c_concat=(1, 20, 3, 8, 16), clip_fea=(1, 257, 1280))
    reference, frame = (1, 16, 8, 16), (1, 16, 1, 8, 16)
    masked = dict(c_concat=(1, 4, 3, 8, 16))
    yield wan("Wan T2V", "WAN21_T2V", "t2v", **CALL)
    yield wan("Wan I2V", "WAN21_I2V", "i2v", unet=dict(in_dim=36), conds=image, **CALL)
    yield wan(
        "Wan Fun with a reference",
        "WAN21_T2V",
        "t2v",
        unet=dict(in_dim_ref_conv=16),
        conds=dict(reference_latent=reference),
        before=32,
        **CALL,
    )
    yield wan(
        "Wan with frames appended",
        "WAN21_T2V",
        "t2v",
        conds=dict(time_dim_concat=(1, 16, 2, 8, 16)),
        after=64,
        **CALL,
    )
    yield wan(
        "Wan with latents as context",
        "WAN21_T2V",
        "t2v",
        conds=dict(context_latents=[noise(frame, 1), noise((1, 16, 1, 4, 6), 2)]),
        after=32 + 6,
        since="0.33",
        **CALL,
    )
    yield wan(
        "Wan 2.2 5B",
        "WAN22_T2V",
        "t2v",
        unet=dict(in_dim=48, out_dim=48),
        **(CALL | dict(latent=(1, 48, 3, 8, 16))),
    )
    yield wan(
        "Wan VACE",
        "WAN21_Vace",
        "vace",
        layers=4,
        unet=dict(num_layers=2, vace_layers=2, vace_in_dim=96),
        conds=dict(vace_context=(1, 1, 96, 3, 8, 16), vace_strength=[1.0]),
        **CALL,
    )
    yield wan(
        "Wan Camera",
        "WAN21_Camera",
        "camera",
        unet=dict(in_dim=36),
        conds=image | dict(camera_conditions=(1, 24, 3, 64, 128)),
        **CALL,
    )
    yield wan(
        "Wan Animate",
        "WAN22_Animate",
        "animate",
        layers=5,
        unet=dict(in_dim=36, num_layers=5, dim=256),
        conds=image | dict(pose_latents=(1, 16, 2, 8, 16)),
        **CALL,
    )
    yield wan(
        "Wan HuMo",
        "WAN21_HuMo",
        "humo",
        conds=dict(reference_latent=frame),
        after=32,
        **CALL,
    )
    yield wan(
        "Wan S2V",
        "WAN22_S2V",
        "s2v",
        unet=dict(audio_inject_layers=[0]),
        conds=dict(reference_latent=frame, reference_motion=(1, 16, 19, 8, 16)),
        after=32 + 4 * 8 + 2 * 4 + 4 * 1 * 2,
        since="0.33",
        **CALL,
    )
    yield wan(
        "Wan SCAIL",
        "WAN21_SCAIL",
        "scail",
        unet=dict(in_dim=20),
        conds=dict(reference_latent=(1, 20, 1, 8, 16), pose_latents=(1, 20, 3, 4, 8), **masked),
        before=32,
        after=3 * 2 * 4,
        since="0.33",
        **CALL,
    )
    yield wan(
        "Wan SCAIL-2",
        "WAN21_SCAIL2",
        "scail2",
        unet=dict(in_dim=20),
        conds=dict(
            reference_latent=(1, 20, 2, 8, 16),
            pose_latents=(1, 20, 3, 4, 8),
            sam_latents=(1, 28, 3, 4, 8),
            ref_mask_latents=(1, 28, 5, 8, 16),
            ref_mask_flag=False,
            **masked,
        ),
        before=2 * 32,
        after=3 * 2 * 4,
        since="0.33",
        **CALL,
    )
    dancer = dict(in_dim_ref_conv=16, audio_inject_layers=[0])
    yield wan("Wan Dancer", "WAN22_WanDancer", "wandancer", unet=dancer, since="0.33", **CALL)


HUNYUAN = dict(image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2])
HUNYUAN |= dict(context_in_dim=32, hidden_size=128, num_heads=2, mlp_ratio=1.0, depth=2)
HUNYUAN |= dict(depth_single_blocks=2, axes_dim=[16, 24, 24], theta=256, qkv_bias=True)
HUNYUAN |= dict(vec_in_dim=32, guidance_embed=False, byt5=False, meanflow=False)
HUNYUAN |= dict(use_cond_type_embedding=False, vision_in_dim=None)


def padding(kept):
    """The mask of a text of 12 tokens, of which only the first few are words."""
    return (torch.arange(12) < kept).long().unsqueeze(0)


def hunyuan(name, config, text, unet=None, conds=None, reference=0, **others):
    call = CALL | dict(layers=4, joint=text, before=reference) | others
    call |= dict(conds=dict(y=(1, 32)) | (conds or {}), newer_unet=dict(meanflow_sum=False))
    return Case(name, config, HUNYUAN | (unet or {}), **call)


def hunyuan_cases():
    yield hunyuan("HunyuanVideo", "HunyuanVideo", 12)
    yield hunyuan(
        "HunyuanVideo with a reference",
        "HunyuanVideo",
        12,
        conds=dict(ref_latent=(1, 16, 1, 8, 16)),
        reference=32,
    )
    yield hunyuan(
        "HunyuanVideo with padded text",
        "HunyuanVideo",
        12,
        conds=dict(attention_mask=padding(7)),
        hidden=5,
    )
    small = dict(patch_size=[1, 1, 1], use_cond_type_embedding=True, byt5=True, vision_in_dim=24)
    yield hunyuan(
        "HunyuanVideo 1.5",
        "HunyuanVideo15",
        12 + 5 + 9,
        unet=small | dict(vec_in_dim=None),
        conds=dict(txt_byt5=(1, 5, 1472), clip_fea=(1, 9, 24)),
        latent=(1, 16, 3, 4, 8),
    )

    yield hunyuan(
        "HunyuanImage 2.1",
        "HunyuanImage21",
        12,
        unet=dict(patch_size=[1, 1], axes_dim=[32, 32], vec_in_dim=None),
        latent=(1, 16, 8, 12),
    )


LTX = dict(image_model="ltxv", in_channels=128, attention_head_dim=64, num_attention_heads=2)
LTX |= dict(num_layers=3, cross_attention_dim=128, caption_channels=32)
LTX_2 = LTX | dict(image_model="ltxav", audio_num_attention_heads=2, audio_attention_head_dim=32)
LTX_2 |= dict(audio_cross_attention_dim=64)
COSMOS = dict(image_model="cosmos", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16)
COSMOS |= dict(out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=128, num_heads=2)
COSMOS |= dict(num_blocks=3, crossattn_emb_channels=32, pos_emb_cls="rope3d")
COSMOS |= dict(use_adaln_lora=True, adaln_lora_dim=16)
COSMOS_1 = COSMOS | dict(block_x_format="THWBD", affline_emb_norm=True)
COSMOS_1 |= dict(extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable")
PREDICT2 = COSMOS | dict(image_model="cosmos_predict2", pos_emb_learnable=True)
MOCHI = dict(image_model="mochi_preview", depth=3, patch_size=2, num_heads=2, hidden_size_x=128)
MOCHI |= dict(hidden_size_y=64, mlp_ratio_x=96, mlp_ratio_y=1.0, learn_sigma=False, in_channels=12)
MOCHI |= dict(qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0, use_t5=True)
MOCHI |= dict(timestep_scale=1000.0, t5_feat_dim=32, t5_token_length=256)
COG = dict(image_model="cogvideox", num_attention_heads=2, attention_head_dim=64, num_layers=3)
COG |= dict(time_embed_dim=32, text_embed_dim=32, use_rotary_positional_embeddings=True)
KANDINSKY = dict(image_model="kandinsky5", model_dim=128, ff_dim=64, num_visual_blocks=3)
KANDINSKY |= dict(time_dim=32, in_text_dim=32, in_text_dim2=16, visual_embed_dim=132)
FLUX = dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=32)
FLUX |= dict(hidden_size=128, mlp_ratio=1.0, num_heads=2, depth=2, depth_single_blocks=2)
FLUX |= dict(axes_dim=[16, 24, 24], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False)
QWEN = dict(image_model="qwen_image", in_channels=64, num_layers=3, attention_head_dim=64)
QWEN |= dict(num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(16, 24, 24))


def other_cases():
    ltx = dict(layers=3, latent=(1, 128, 4, 4, 8), text=(1, 12, 32))
    conds = dict(attention_mask=None)
    yield Case("LTX-Video", "LTXV", LTX, video=128, conds=conds, **ltx)
    conds = conds | dict(keyframe_idxs=(1, 3, 32), denoise_mask=(1, 1, 4, 4, 8))
    newer = dict(keyframe_idxs=(1, 3, 32, 2), denoise_mask=torch.ones(1, 1, 4, 4, 8))
    ltx |= dict(conds=conds, newer_conds=newer)
    yield Case("LTX-Video with a guide frame", "LTXV", LTX, video=96, after=32, **ltx)
    sound = dict(
        layers=3,
        latent=(1, 1, 128 * 128 + 8 * 20 * 16),
        text=(1, 12, 64),
        conds=dict(attention_mask=None, latent_shapes=[(1, 128, 4, 4, 8), (1, 8, 20, 16)]),
        since="0.33",
    )
    yield Case("LTX-2", "LTXAV", LTX_2, video=128, **sound)
    gates = LTX_2 | dict(apply_gated_attention=True, cross_attention_adaln=True)
    yield Case("LTX-2.3", "LTXAV", gates, video=128, **sound)
    newest = gates | dict(ff_bias=False, audio_ff_bias=False, use_keyframes_abs_pos_embedding=True)
    yield Case("LTX-2.5", "LTXAV", newest, video=128, **sound)
    guided = dict(keyframe_idxs=(1, 3, 32, 2), denoise_mask=torch.ones(1, 1, 4, 4, 8))
    sound |= dict(conds=sound["conds"] | guided)
    yield Case("LTX-2.5 with a guide frame", "LTXAV", newest, video=96, after=32, **sound)
    yield Case("Cosmos 1", "CosmosT2V", COSMOS_1, layers=3, **CALL)
    yield Case("Cosmos Predict2", "CosmosT2IPredict2", PREDICT2, layers=3, **CALL)
    yield Case(
        "Mochi",
        "GenmoMochi",
        MOCHI,
        layers=3,
        after=7,
        conds=dict(attention_mask=torch.ones(1, 12), num_tokens=7),
        **(CALL | dict(latent=(1, 12, 3, 8, 16))),
    )
    yield Case("CogVideoX", "CogVideoX_T2V", COG, layers=3, before=12, since="0.33", **CALL)
    yield Case(
        "CogVideoX 1.5",
        "CogVideoX_T2V",
        COG | dict(patch_size_t=2),
        layers=3,
        before=12,
        since="0.33",
        **(CALL | dict(latent=(1, 16, 5, 8, 16))),
    )
    yield Case(
        "Kandinsky 5",
        "Kandinsky5",
        KANDINSKY,
        layers=3,
        conds=dict(y=(1, 16), c_concat=(1, 17, 3, 8, 16)),
        since="0.33",
        **CALL,
    )
    image = dict(newer_unet=dict(txt_ids_dims=[]))
    image |= dict(latent=(1, 16, 16, 24), text=(1, 12, 32), video=96)
    references = [noise((1, 16, 8, 8), 1), noise((1, 16, 4, 6), 2)]
    yield Case("Flux", "Flux", FLUX, layers=4, before=12, conds=dict(y=(1, 32)), **image)
    yield Case(
        "Flux Kontext",
        "Flux",
        FLUX,
        layers=4,
        before=12,
        after=16 + 6,
        conds=dict(y=(1, 32), ref_latents=references),
        **image,
    )
    flux_2 = FLUX | dict(image_model="flux2", axes_dim=[16] * 4, vec_in_dim=None, mlp_ratio=3.0)
    flux_2 |= dict(global_modulation=True, mlp_silu_act=True, ops_bias=False)
    yield Case("Flux 2", "Flux2", flux_2, layers=4, before=12, **image)
    image |= dict(latent=(1, 16, 1, 16, 24), newer_unet={})
    references = [noise((1, 16, 1, 8, 8), 1)]
    yield Case("Qwen-Image", "QwenImage", QWEN, layers=3, before=12, **image)
    yield Case(
        "Qwen-Image with padded text",
        "QwenImage",
        QWEN,
        layers=3,
        before=12,
        conds=dict(attention_mask=padding(7)),
        hidden=5,
        since="0.33",
        **image,
    )
    yield Case(
        "Qwen-Image-Edit",
        "QwenImage",
        QWEN,
        layers=3,
        before=12,
        after=16,
        conds=dict(ref_latents=references),
        **image,
    )


CASES = [*wan_cases(), *hunyuan_cases(), *other_cases(), *H3_CASES]


def find(name):
    return next(case for case in CASES if case.name == name)


HUNYUAN_CASE = find("HunyuanVideo")

#: Known not to be supported; the first frame is a reference, and the pose has none for it.
ANIMATE_2 = wan(
    "Wan Animate 2", "WAN_Animate2", "animate2", unet=dict(in_dim=36), since="0.33", **CALL
)

#: One model of every family: what nodes put into its conditioning beside the text.
SAMPLED = {  # what nodes put into a conditioning, and a latent of their size
    "Wan T2V": {},
    "Wan Fun with a reference": dict(reference_latents=[(1, 16, 1, 8, 16)]),
    "Wan with latents as context": dict(context_latents=[(1, 16, 1, 8, 16), (1, 16, 1, 4, 6)]),
    "Wan HuMo": dict(reference_latents=[(1, 16, 1, 8, 16)]),
    "Wan SCAIL": dict(reference_latents=[(1, 16, 1, 8, 16)], pose_video_latent=(1, 16, 3, 4, 8)),
    "Wan SCAIL-2": dict(
        reference_latents=[(1, 16, 1, 8, 16)] * 2,
        pose_video_latent=(1, 16, 3, 4, 8),
        driving_mask_28ch=(1, 3, 28, 4, 8),
        ref_mask_28ch=(1, 5, 28, 8, 16),
        ref_mask_flag=False,
    ),
    "HunyuanVideo": dict(pooled_output=(1, 32), attention_mask=None),
    "LTX-Video": dict(attention_mask=torch.ones(1, 12, dtype=torch.long)),
    "LTX-2": {},
    "LTX-2.3": {},
    "LTX-2.5": {},
    "Cosmos Predict2": {},
    "Mochi": dict(attention_mask=torch.tensor([[1] * 7 + [0] * 5])),
    "CogVideoX": {},
    "Kandinsky 5": dict(pooled_output=(1, 16)),
    "Flux": dict(pooled_output=(1, 32)),
    "Flux Kontext": dict(
        pooled_output=(1, 32), reference_latents=[(1, 16, 8, 8), (1, 16, 4, 6)], guidance=3.5
    ),
    "Qwen-Image with padded text": dict(attention_mask=padding(7)),
    "Qwen-Image-Edit": dict(reference_latents=[(1, 16, 1, 8, 8)]),
    **H3_SAMPLED,
}


def conditioning(case, seed):
    """What ComfyUI's samplers take as positive or negative."""
    extra = {
        key: [noise(shape, i) for i, shape in enumerate(value)]
        if isinstance(value, list)
        else made(value)
        for key, value in SAMPLED[case.name].items()
    }
    return [[noise(case.text, seed), extra]]


def make_model(case):
    """The model of a case in ComfyUI, with random weights."""
    config = getattr(importlib.import_module("comfy.supported_models"), case.config)(
        case.unet | (case.newer_unet if version() >= NEWER else {})
    )
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data.normal_(0, scale, generator=generator).add_(parameter.ndim == 1)
    for name, buffer in model.diffusion_model.named_buffers():
        if name.endswith("inv_freq"):  # as empty as the parameters
            buffer.copy_(torch.logspace(0, -3, len(buffer)))
    return model.eval()


def make_patcher(case):
    """The MODEL of a graph, on the CPU."""
    from comfy.model_patcher import ModelPatcher

    return ModelPatcher(make_model(case), torch.device("cpu"), torch.device("cpu"))


def sample(
    model,
    case,
    frames=1,
    steps=3,
    cfg=3.0,
    sampler="euler",
    scheduler="simple",
    prompts=None,
    latent=None,
    **options,
):
    """A latent of ``frames`` times the frames of the case, from ComfyUI's own sampler."""
    import comfy.sample

    torch.manual_seed(1)  # some samplers draw from it
    positive, negative = prompts or (conditioning(case, i) for i in range(2))
    if latent is None:
        _, channels, first, *size = case.latent
        latent = torch.zeros(1, channels, first * frames, *size)
    start = comfy.sample.prepare_noise(latent, 1)
    with torch.inference_mode():
        return comfy.sample.sample(
            *(model, start, steps, cfg, sampler, scheduler, positive, negative, latent),
            seed=1,
            **options,
        )


def demo_weights():
    return str(REPOSITORY / "demo" / "weights" / WEIGHTS)


def skips_and_stays_close(plain, settings):
    """The demo model, as loaded in some format: these settings skip and change little."""
    from comfyui_liteattention.integrations.comfy.session import apply_patch, patch_of

    prompts = [[[torch.zeros(1, 8, 4096), {}]], [[torch.zeros(1, 8, 4096), {}]]]
    latent = torch.zeros(1, 16, 4, 16, 16)
    model = apply_patch(plain, settings)
    assert type(model) is type(plain)
    dense, out = (
        sample(one, find("Wan T2V"), latent=latent, prompts=prompts) for one in (plain, model)
    )
    assert patch_of(model).last_report.active
    assert not torch.equal(out, dense)
    assert (out - dense).std() < 0.2 * dense.std()
