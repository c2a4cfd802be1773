"""Which other node took the attention, if a run ends without one call of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from ...eligibility import CROSS_ATTENTION
from .hooks import OVERRIDE, is_ours
from .stale_graph import is_compiled

NEVER_ASKED = "the model did not pass any attention call on to LiteAttention"
COMPILED = (
    "torch.compile uses a graph that was made without LiteAttention: restart ComfyUI, with the "
    "LiteAttention node switched on in the first run"
)
#: Beginnings of reasons that are not about the attention over the video.
BESIDE = (CROSS_ATTENTION, "not the model's video attention", "the model asks for exact attention")


def asked_first(options: Mapping[str, Any]) -> str | None:
    """The name of the override that ComfyUI asks before ours, or None."""
    found = options.get(OVERRIDE)
    return None if found is None or is_ours(found) else name_of(found)


def taker(model_patcher: Any, options: Mapping[str, Any], first: str | None) -> str | None:
    """Why LiteAttention was never asked for the video's attention, as far as can be seen; None if
    it can't. ``first``: from :func:`asked_first`."""
    for path, patch in getattr(model_patcher, "object_patches", {}).items():
        if re.search(r"\d", path) and path.endswith(".forward"):
            return f"{name_of(patch)} has put its own attention into this model"
    for patch in options.get("patches_replace", {}).get("dit", {}).values():
        name = name_of(patch)
        if name == _SPARSE:
            return f"{name} has taken the attention of this model"
    if first is not None:
        return f"{first} has taken the attention of this model"
    return COMPILED if is_compiled(options) else None


def explained(reasons: Mapping[str, int], cause: str | None) -> dict[str, int]:
    """The reasons of a run without a call of ours, with ``cause``, why there was none, first."""
    about_video = [reason for reason in reasons if not reason.startswith(BESIDE)]
    if about_video:
        return dict(reasons)
    return {cause or NEVER_ASKED: 1, **reasons}


def name_of(function: Any) -> str:
    """A readable name for the pack, or the part of ComfyUI, that a function comes from."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    named = function if hasattr(function, "__qualname__") else type(function)
    module = str(named.__module__)
    if module.endswith("nodes_sparse_attention"):
        return _SPARSE
    if found := re.search(r"custom_nodes[/\\.]([^/\\.]+)", module):
        return found[1].replace("_x_", ".")
    return f"{module.rpartition('.')[2]}.{named.__qualname__.partition('.')[0]}"


_SPARSE = "ComfyUI's Model Sparse Attention"
