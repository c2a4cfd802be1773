"""LTX-Video, and LTX-2, 2.3 and 2.5 with sound."""

from __future__ import annotations

from math import prod
from typing import Any

from .sequence import Family, FormOrReason, ModelCall, grid_of, sequence


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
    return sequence((frames - appended, rows, columns), after=appended * rows * columns)


FAMILY: Family = {
    ("comfy.ldm.lightricks.model", "LTXVModel"): _ltx,
    ("comfy.ldm.lightricks.av_model", "LTXAVModel"): _ltx,
}
