"""HunyuanVideo, 1.0 and 1.5, and HunyuanImage."""

from __future__ import annotations

from typing import Any

from .sequence import Family, FormOrReason, ModelCall, grid_of, sequence, tokens_of


def _hunyuan(model: Any, call: ModelCall) -> FormOrReason:
    """Joint attention with text, glyphs (ByT5) and image features. The video comes last; in older
    versions of ComfyUI, whose blocks set ``flipped_img_txt``, it comes first. A reference comes
    right before the video."""
    conds = call.conds
    text = call.text
    if conds.get("txt_byt5") is not None and model.byt5_in is not None:
        text += conds["txt_byt5"].shape[1]
    if conds.get("clip_fea") is not None:
        text += conds["clip_fea"].shape[1]
    reference = tokens_of(conds.get("ref_latent"), model.patch_size)
    grid = grid_of(call.latent, model.patch_size)
    if getattr(model.double_blocks[0], "flipped_img_txt", False):
        return sequence(grid, reference, text)
    return sequence(grid, text + reference)


FAMILY: Family = {("comfy.ldm.hunyuan_video.model", "HunyuanVideo"): _hunyuan}
