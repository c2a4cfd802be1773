"""ComfyUI: a graph of torch.compile that was made while LiteAttention was bypassed.

ComfyUI's own compile node has PyTorch leave transformer options out of the guards of a graph, and
that is where an attention override is put. So a graph that was made without ours would be used with
it, too, and we would never be asked. (One that was made with ours does for both: it asks when it
runs.) Where a call of a compiled model ends without one question, graphs are made anew: the first
step of a run is dense in any case, and the second one comes to us.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

log = logging.getLogger(__name__)

#: The key of the wrapper that ComfyUI's own compile node adds.
COMPILE_KEY = "torch.compile"
MADE_ANEW = (
    "torch.compile had a graph that was made without LiteAttention: it was made anew, once, after "
    "the first step"
)

#: Models of which that was tried, and that have not asked since.
_tried: WeakSet[nn.Module] = WeakSet()


def is_compiled(options: Mapping[str, Any]) -> bool:
    """Whether ComfyUI's node compiles the model, by its transformer options."""
    keys: Iterable[Any] = options.get("wrappers", {}).get("apply_model", ())
    return COMPILE_KEY in keys


def made_anew(model: nn.Module, options: Mapping[str, Any], asked: bool) -> bool:
    """A call of the model has returned, in which we were ``asked`` or not: whether its graphs were
    dropped for that. Not twice if it doesn't help."""
    if asked:
        _tried.discard(model)
        return False
    if model in _tried or not is_compiled(options):
        return False
    _tried.add(model)
    torch.compiler.reset()
    log.info("LiteAttention: %s", MADE_ANEW)
    return True
