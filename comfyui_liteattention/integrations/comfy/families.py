"""Which models are understood: where the video tokens of a self-attention call lie.

A self-attention call shows nothing but its length. What else is in the sequence (text, reference
images, guides) follows from what the model is called with, so the exact length is known before the
model runs. A call of another length is not the one that is meant, and stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ...token_order import Grid, VideoTokens

#: Patch sizes that an unknown video model may use: tokens of 2 x 2, or single latent pixels.
USUAL_PATCHES = ((1, 2, 2), (1, 1, 1))


class ModelCall(NamedTuple):
    """What ComfyUI calls a diffusion model with.

    ``latent``: the shape ``[B, C, T, H, W]`` or ``[B, C, H, W]``; ``text``: tokens of the text
    conditioning; ``conds``: the other conditionings by name.
    """

    latent: Sequence[int]
    text: int
    conds: Mapping[str, Any]


class Form(NamedTuple):
    """What a self-attention call over the video looks like.

    ``lengths`` that it can have (one, but for unknown models) and the place of the video in it;
    ``video`` is None where all tokens are video on an unknown grid. ``note`` is for the report.
    """

    lengths: frozenset[int]
    video: VideoTokens | None
    note: str = ""

    def misfit(self, length: int) -> str | None:
        """Why a call of this length is not the one that is meant, or None."""
        if length in self.lengths:
            return None
        expected = " or ".join(map(str, sorted(self.lengths)))
        return f"not the model's video attention ({length} tokens; that has {expected})"


FormOrReason = Form | str
Describe = Callable[[Any, ModelCall], FormOrReason]


def describe_call(diffusion_model: Any, call: ModelCall) -> FormOrReason:
    """The form of the self-attention calls in one call of a ComfyUI diffusion model, or the reason
    why all of them stay dense."""
    # torch.compile puts an object of its own around a model.
    diffusion_model = getattr(diffusion_model, "_orig_mod", diffusion_model)
    kind = type(diffusion_model)
    describe = FAMILIES.get((kind.__module__, kind.__name__), _generic)
    try:
        return describe(diffusion_model, call)
    except (AttributeError, IndexError, TypeError, ValueError) as error:  # of another version
        return f"this version of {kind.__name__} is not understood ({error})"


def _wan(model: Any, call: ModelCall) -> FormOrReason:
    """``ref_conv`` puts a reference image in front; references may follow as further frames."""
    conds, before = call.conds, 0
    if model.ref_conv is not None and "reference_latent" in conds:
        before = _tokens(conds["reference_latent"], model.patch_size[1:])
    after = _tokens(conds.get("time_dim_concat"), model.patch_size)
    after += sum(_tokens(latent, model.patch_size) for latent in conds.get("context_latents") or ())
    return _sequence(_grid(call.latent, model.patch_size), before, after)


def _wan_without_references(model: Any, call: ModelCall) -> FormOrReason:
    """VACE, camera control: the conditioning has no tokens of its own in the video's sequence."""
    after = _tokens(call.conds.get("time_dim_concat"), model.patch_size)
    return _sequence(_grid(call.latent, model.patch_size), after=after)


def _wan_reference_behind(model: Any, call: ModelCall) -> FormOrReason:
    """HuMo, S2V: the reference follows the video, and in S2V past motion in three resolutions."""
    conds = call.conds
    after = _tokens(conds.get("time_dim_concat"), model.patch_size)
    after += _tokens(conds.get("reference_latent"), model.patch_size)
    motion = conds.get("reference_motion")
    if motion is not None and hasattr(model, "frame_packer"):
        rows, columns = motion.shape[-2:]
        near, middle, far = ((rows // p) * (columns // p) for p in (2, 4, 8))
        after += near + middle + 4 * far
    return _sequence(_grid(call.latent, model.patch_size), after=after)


def _scail(model: Any, call: ModelCall) -> FormOrReason:
    """The reference's frames in front of the video, the pose's tokens behind it."""
    conds, patch = call.conds, model.patch_size
    before = _tokens(conds.get("reference_latent"), patch)
    after = _tokens(conds.get("time_dim_concat"), patch) + _tokens(conds.get("pose_latents"), patch)
    return _sequence(_grid(call.latent, patch), before, after)


def _hunyuan(model: Any, call: ModelCall) -> FormOrReason:
    """Joint with text, glyphs (ByT5) and image features. The video came first in older versions of
    ComfyUI, which their blocks say, and comes last in newer ones; a reference is right before."""
    conds = call.conds
    text = call.text
    if conds.get("txt_byt5") is not None and model.byt5_in is not None:
        text += conds["txt_byt5"].shape[1]
    if conds.get("clip_fea") is not None:
        text += conds["clip_fea"].shape[1]
    reference = _tokens(conds.get("ref_latent"), model.patch_size)
    grid = _grid(call.latent, model.patch_size)
    if getattr(model.double_blocks[0], "flipped_img_txt", False):
        return _sequence(grid, reference, text)
    return _sequence(grid, text + reference)


def _ltx(model: Any, call: ModelCall) -> FormOrReason:
    """Guide frames are appended to the latent itself; a latent with sound holds two streams."""
    grid = _grid(call.latent, model.patchifier.patch_size)
    sound = call.conds.get("latent_shapes", ())[1:]
    if any(shape[2] == prod(grid) for shape in sound):
        return "video and audio have the same number of tokens: they can't be told apart"
    guides = call.conds.get("keyframe_idxs")
    frames, rows, columns = grid
    appended, left = divmod(0 if guides is None else guides.shape[2], rows * columns)
    if left or appended >= frames:
        return "guide tokens that are not whole frames"
    return _sequence((frames - appended, rows, columns), after=appended * rows * columns)


def _cogvideo(model: Any, call: ModelCall) -> FormOrReason:
    patch = (model.patch_size_t or 1, model.patch_size, model.patch_size)
    return _sequence(_grid(call.latent, patch), before=call.text)


def _mochi(model: Any, call: ModelCall) -> FormOrReason:
    """Only as many text tokens as the prompt has follow the video."""
    text = min(int(call.conds.get("num_tokens", 256)), call.text)
    return _sequence(_grid(call.latent, (1, model.patch_size, model.patch_size)), after=text)


def _cosmos(model: Any, call: ModelCall) -> FormOrReason:
    patch = (model.patch_temporal, model.patch_spatial, model.patch_spatial)
    return _sequence(_grid(call.latent, patch))


def _kandinsky(model: Any, call: ModelCall) -> FormOrReason:
    return _sequence(_grid(call.latent, model.patch_size))


def _text_to_image(model: Any, call: ModelCall) -> FormOrReason:
    """Flux, Qwen-Image: text, the image, then reference images."""
    patch = (1, model.patch_size, model.patch_size)
    after = sum(_tokens(latent, patch) for latent in call.conds.get("ref_latents") or ())
    return _sequence(_grid(call.latent, patch), call.text, after)


def _generic(model: Any, call: ModelCall) -> FormOrReason:
    """A video model that nobody has looked at: only calls that see the video and nothing else.

    The order of the tokens is not known either. Text or references in the sequence would make it
    longer than the video, so such calls stay dense.
    """
    name = type(model).__name__
    if len(call.latent) != 5:
        return f"this model is not supported ({name})"
    own = getattr(model, "patch_size", None)
    patches = (own,) if isinstance(own, (tuple, list)) and len(own) == 3 else USUAL_PATCHES
    lengths = frozenset(prod(_grid(call.latent, patch)) for patch in patches)
    note = f"generic mode: {name} is not known; only attention over the bare video is skipped"
    return Form(lengths, None, note)


def _unsupported(reason: str) -> Describe:
    return lambda model, call: reason


def _wan_family() -> dict[tuple[str, str], Describe]:
    wan = "comfy.ldm.wan."
    return {
        (wan + "model", "WanModel"): _wan,
        (wan + "model_animate", "AnimateWanModel"): _wan,
        (wan + "model_wandancer", "WanDancerModel"): _wan,
        (wan + "model", "VaceWanModel"): _wan_without_references,
        (wan + "model", "CameraWanModel"): _wan_without_references,
        (wan + "model", "WanModel_S2V"): _wan_reference_behind,
        (wan + "model", "HumoWanModel"): _wan_reference_behind,
        (wan + "model", "SCAILWanModel"): _scail,
        (wan + "model", "SCAIL2WanModel"): _scail,
        (wan + "model_animate2", "WanAnimate2Model"): _unsupported(
            "Wan Animate 2 attends in windows with a cache of its own"
        ),
        (wan + "ar_model", "CausalWanModel"): _unsupported(
            "autoregressive Wan attends with a cache of its own"
        ),
    }


#: How the sequence of each model is found, by the module and the name of ComfyUI's class.
FAMILIES: dict[tuple[str, str], Describe] = {
    **_wan_family(),
    ("comfy.ldm.hunyuan_video.model", "HunyuanVideo"): _hunyuan,
    ("comfy.ldm.lightricks.model", "LTXVModel"): _ltx,
    ("comfy.ldm.lightricks.av_model", "LTXAVModel"): _ltx,
    ("comfy.ldm.cosmos.model", "GeneralDIT"): _cosmos,
    ("comfy.ldm.cosmos.predict2", "MiniTrainDIT"): _cosmos,
    ("comfy.ldm.genmo.joint_model.asymm_models_joint", "AsymmDiTJoint"): _mochi,
    ("comfy.ldm.cogvideo.model", "CogVideoXTransformer3DModel"): _cogvideo,
    ("comfy.ldm.kandinsky5.model", "Kandinsky5"): _kandinsky,
    ("comfy.ldm.flux.model", "Flux"): _text_to_image,
    ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel"): _text_to_image,
}


def _sequence(grid: Grid, before: int = 0, after: int = 0) -> Form:
    """The video's tokens with others before and after them."""
    video = VideoTokens(grid, before)
    return Form(frozenset({video.stop + after}), video)


def _grid(shape: Sequence[int], patch: Sequence[int]) -> Grid:
    """Frames, rows and columns of tokens of a latent ``[..., T, H, W]``; an image has one frame."""
    sizes = [1, *shape[2:]][-3:]
    patch = [1, *patch][-3:]
    frames, rows, columns = (-(-size // p) for size, p in zip(sizes, patch, strict=True))
    return frames, rows, columns


def _tokens(latent: Any, patch: Sequence[int]) -> int:
    """Tokens that a conditioning latent is cut into; None has none."""
    return 0 if latent is None else prod(_grid(latent.shape, patch))
