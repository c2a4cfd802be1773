"""Wan 2.1 and 2.2, and what is built on their blocks."""

from __future__ import annotations

from typing import Any

from .sequence import Family, FormOrReason, ModelCall, grid_of, sequence, tokens_of, unsupported


def _wan(model: Any, call: ModelCall) -> FormOrReason:
    """``ref_conv`` puts a reference image first; references may follow the video as more frames."""
    conds, before = call.conds, 0
    if model.ref_conv is not None and "reference_latent" in conds:
        before = tokens_of(conds["reference_latent"], model.patch_size[1:])
    after = tokens_of(conds.get("time_dim_concat"), model.patch_size)
    after += sum(
        tokens_of(latent, model.patch_size) for latent in conds.get("context_latents") or ()
    )
    return sequence(grid_of(call.latent, model.patch_size), before, after)


def _wan_without_references(model: Any, call: ModelCall) -> FormOrReason:
    """VACE, camera control: the conditioning has no tokens of its own in the video's sequence."""
    after = tokens_of(call.conds.get("time_dim_concat"), model.patch_size)
    return sequence(grid_of(call.latent, model.patch_size), after=after)


def _wan_reference_behind(model: Any, call: ModelCall) -> FormOrReason:
    """HuMo, S2V: the reference follows the video, and in S2V past motion in three resolutions."""
    conds = call.conds
    after = tokens_of(conds.get("time_dim_concat"), model.patch_size)
    after += tokens_of(conds.get("reference_latent"), model.patch_size)
    motion = conds.get("reference_motion")
    if motion is not None and hasattr(model, "frame_packer"):
        rows, columns = motion.shape[-2:]
        near, middle, far = ((rows // p) * (columns // p) for p in (2, 4, 8))
        after += near + middle + 4 * far
    return sequence(grid_of(call.latent, model.patch_size), after=after)


def _scail(model: Any, call: ModelCall) -> FormOrReason:
    """The reference's frames in front of the video, the pose's tokens behind it."""
    conds, patch = call.conds, model.patch_size
    before = tokens_of(conds.get("reference_latent"), patch)
    after = tokens_of(conds.get("time_dim_concat"), patch) + tokens_of(
        conds.get("pose_latents"), patch
    )
    return sequence(grid_of(call.latent, patch), before, after)


_WAN = "comfy.ldm.wan."
FAMILY: Family = {
    (_WAN + "model", "WanModel"): _wan,
    (_WAN + "model_animate", "AnimateWanModel"): _wan,
    (_WAN + "model_wandancer", "WanDancerModel"): _wan,
    (_WAN + "model", "VaceWanModel"): _wan_without_references,
    (_WAN + "model", "CameraWanModel"): _wan_without_references,
    (_WAN + "model", "WanModel_S2V"): _wan_reference_behind,
    (_WAN + "model", "HumoWanModel"): _wan_reference_behind,
    (_WAN + "model", "SCAILWanModel"): _scail,
    (_WAN + "model", "SCAIL2WanModel"): _scail,
    (_WAN + "model_animate2", "WanAnimate2Model"): unsupported(
        "Wan Animate 2 asks for one frame at a time, to which a frame of the pose is added"
    ),
    (_WAN + "ar_model", "CausalWanModel"): unsupported(
        "autoregressive Wan attends with a cache of its own"
    ),
}
