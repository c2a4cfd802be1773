"""ComfyUI: a graph of torch.compile that was made while LiteAttention was bypassed.

Attention overrides are part of the transformer options, and ComfyUI's own compile node excludes
these from the guards of a graph. So a graph that was compiled without our override would also be
used with it, and we would never be called. (A graph compiled with ours is fine in both cases,
because our operator decides when it runs.) If a call of a compiled model ends without one attention
call of ours, we have it compiled again, which costs no skipping: the first step is dense anyway.
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

#: Models whose graphs were dropped, and that have not called us since.
_tried: WeakSet[nn.Module] = WeakSet()


def is_compiled(options: Mapping[str, Any]) -> bool:
    """Whether ComfyUI's compile node was applied to the model, judging by its options."""
    keys: Iterable[Any] = options.get("wrappers", {}).get("apply_model", ())
    return COMPILE_KEY in keys


def made_anew(model: nn.Module, options: Mapping[str, Any], asked: bool) -> bool:
    """After a call of the model: drop its compiled graphs if it is compiled and we were not
    ``asked``. Returns whether they were dropped. Not tried again if it didn't help."""
    if asked:
        _tried.discard(model)
        return False
    if model in _tried or not is_compiled(options):
        return False
    _tried.add(model)
    torch.compiler.reset()
    log.info("LiteAttention: %s", MADE_ANEW)
    return True
