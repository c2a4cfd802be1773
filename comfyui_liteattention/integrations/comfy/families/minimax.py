"""MiniMax H3: one packed sequence of text, conditions, sound and video, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....token_order import VideoTokens
from .sequence import Family, Form, FormOrReason, ModelCall

NO_LAYOUT = "MiniMax H3 was called without its layout, which tells where the video lies"
#: Where newer versions of ComfyUI keep the layout while the model runs.
LAYOUT = "minimax_h3_layout"


def _minimax(model: Any, call: ModelCall) -> FormOrReason:
    """From the layout that ComfyUI makes once per run. The model follows it unless the latent has
    changed since."""
    layout = (call.conds.get("minimax_payload") or {}).get("layout")
    if layout is None or len(call.latent) != 5:
        return NO_LAYOUT
    frames, rows, columns = call.latent[2:]
    now = call.text, frames, rows + rows % 2, columns + columns % 2
    return _form(layout) if layout.signature[:4] == now else NO_LAYOUT


def at_the_call(options: Mapping[str, Any]) -> Form | None:
    """The form, from the layout that newer versions pass to each attention call; or None."""
    layout = options.get(LAYOUT)
    return None if layout is None else _form(layout)


def _form(layout: Any) -> Form:
    """A layout's segments are ``(start, stop, kind)``; the video being made is the kind ``video``.
    Its signature is ``(text, frames, rows, columns, sound)`` of the latent, of which a token covers
    2 x 2 pixels."""
    [(start, stop)] = [(a, b) for a, b, kind in layout.segments if kind == "video"]
    _, frames, rows, columns, _ = layout.signature
    video = VideoTokens((frames, rows // 2, columns // 2), start)
    if video.stop != stop:
        raise ValueError(f"{stop - start} video tokens, not {video.stop - start}")
    return Form(frozenset({layout.seq_len}), video)


FAMILY: Family = {("comfy.ldm.minimax.model", "MiniMaxH3Model"): _minimax}
