"""Where a module's own ``forward`` is called from.

Libraries that hook a module replace its ``forward`` and keep the old one: diffusers in its hook
registry, accelerate as ``_old_forward``. Our wrapper goes directly around the module's own
``forward``, inside all of theirs. So it is certain what it calls, other hooks may come and go
around it, and it isn't called when a hook answers in place of the module, as step caches do.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

#: The object that holds a ``forward``, and its attribute.
Place = tuple[Any, str]


def own_place(module: nn.Module) -> Place:
    """Where the module's own ``forward`` is held; the outermost place if it can't be found."""
    for holder, name in _places(module):
        forward = getattr(holder, name, None)
        if isinstance(forward, MethodType) and forward.__self__ is module:
            return holder, name
    return module, "forward"


def place_of(forward: object, module: nn.Module) -> Place | None:
    """Where ``forward`` is held on the module, or None."""
    for holder, name in _places(module):
        if getattr(holder, name, None) is forward:
            return holder, name
    return None


def _places(module: nn.Module) -> Iterator[Place]:
    yield module, "forward"
    yield module, "_old_forward"
    registry = getattr(module, "_diffusers_hook", None)
    for reference in () if registry is None else registry._fn_refs:
        yield reference, "original_forward"
        yield reference, "forward"
