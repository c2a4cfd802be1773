"""Video models with a simple sequence, and image models."""

from __future__ import annotations

from typing import Any

from .sequence import Family, FormOrReason, ModelCall, grid_of, sequence, tokens_of


def _cogvideo(model: Any, call: ModelCall) -> FormOrReason:
    patch = (model.patch_size_t or 1, model.patch_size, model.patch_size)
    return sequence(grid_of(call.latent, patch), before=call.text)


def _mochi(model: Any, call: ModelCall) -> FormOrReason:
    """The video, then the prompt's text tokens without padding."""
    text = min(int(call.conds.get("num_tokens", 256)), call.text)
    return sequence(grid_of(call.latent, (1, model.patch_size, model.patch_size)), after=text)


def _cosmos(model: Any, call: ModelCall) -> FormOrReason:
    patch = (model.patch_temporal, model.patch_spatial, model.patch_spatial)
    return sequence(grid_of(call.latent, patch))


def _kandinsky(model: Any, call: ModelCall) -> FormOrReason:
    return sequence(grid_of(call.latent, model.patch_size))


def _text_to_image(model: Any, call: ModelCall) -> FormOrReason:
    """Flux, Qwen-Image: text, the image, then reference images."""
    patch = (1, model.patch_size, model.patch_size)
    after = sum(tokens_of(latent, patch) for latent in call.conds.get("ref_latents") or ())
    return sequence(grid_of(call.latent, patch), call.text, after)


FAMILY: Family = {
    ("comfy.ldm.cosmos.model", "GeneralDIT"): _cosmos,
    ("comfy.ldm.cosmos.predict2", "MiniTrainDIT"): _cosmos,
    ("comfy.ldm.genmo.joint_model.asymm_models_joint", "AsymmDiTJoint"): _mochi,
    ("comfy.ldm.cogvideo.model", "CogVideoXTransformer3DModel"): _cogvideo,
    ("comfy.ldm.kandinsky5.model", "Kandinsky5"): _kandinsky,
    ("comfy.ldm.flux.model", "Flux"): _text_to_image,
    ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel"): _text_to_image,
}
