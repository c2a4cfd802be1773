"""Where a module's own ``forward`` is called from.

Libraries that hook a module put a function in place of its ``forward`` and keep what was there:
diffusers in the registry of its hooks, accelerate as ``_old_forward``. Ours goes around the
module's own, inside all of them: then it knows whose ``forward`` it calls, hooks come and go around
it, and those that answer for the module, as caches do, keep us out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

#: The object that holds a ``forward``, and its attribute.
Place = tuple[Any, str]


def own_place(module: nn.Module) -> Place:
    """Where the module's own ``forward`` is; the outermost place where that isn't known."""
    for holder, name in _places(module):
        forward = getattr(holder, name, None)
        if isinstance(forward, MethodType) and forward.__self__ is module:
            return holder, name
    return module, "forward"


def place_of(forward: object, module: nn.Module) -> Place | None:
    """Where ``forward`` is on the module, or None."""
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
