"""LTX-Video, and LTX-2, 2.3 and 2.5 with sound."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from .sequence import Family, FormOrReason, ModelCall, grid_of, sequence

WEIGHTED = "LTX guides with a strength other than 1, or a mask: they mask the video's attention"


def _ltx(model: Any, call: ModelCall) -> FormOrReason:
    """Guide frames are appended to the latent itself; a latent with sound holds two streams."""
    grid = grid_of(call.latent, model.patchifier.patch_size)
    sound = call.conds.get("latent_shapes", ())[1:]
    if any(shape[2] == prod(grid) for shape in sound):
        return "video and audio have the same number of tokens: they can't be told apart"
    guides = call.conds.get("keyframe_idxs")
    frames, rows, columns = grid
    appended, left = divmod(0 if guides is None else guides.shape[2], rows * columns)
    if left or appended >= frames:
        return "guide tokens that are not whole frames"
    if appended and any(map(_weighted, call.conds.get("guide_attention_entries") or ())):
        return WEIGHTED
    return sequence((frames - appended, rows, columns), after=appended * rows * columns)


def _weighted(guide: Mapping[str, Any]) -> bool:
    """Whether the video attends to a guide, or to parts of it, more or less than to the rest."""
    return guide["strength"] != 1.0 or guide.get("pixel_mask") is not None


FAMILY: Family = {
    ("comfy.ldm.lightricks.model", "LTXVModel"): _ltx,
    ("comfy.ldm.lightricks.av_model", "LTXAVModel"): _ltx,
}
