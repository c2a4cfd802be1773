"""Which layer asks for attention.

ComfyUI tells an attention override neither the layer nor its module, and counting calls goes wrong
as soon as guidance skips a layer. But the layer is on the call stack, even if its ``forward`` has
been replaced. Reading it there changes nothing in the model, which others may be using.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

#: How many frames up the stack to look: there may be wrappers between a layer's forward and us.
DEPTH = 32
#: Words in the names of block lists that don't distinguish one list from another.
PLAIN = {"block", "blocks", "layers", "transformer", "visual"}


class Layer(NamedTuple):
    """``name``: the same in each call of the model. ``part``: counts the layer's attention calls
    within one call of the model (some packs and models ask for a few heads or frames at a time)."""

    name: str
    part: int


class Names:
    """Short and unique names for the layers of one run."""

    def __init__(self) -> None:
        self._paths: dict[int, dict[int, str]] = {}
        self._names: dict[str, str] = {}

    def paths(self, model: nn.Module) -> Mapping[int, str]:
        """The path of each module of a diffusion model, by its id."""
        paths = self._paths.get(id(model))
        if paths is None:
            paths = {id(module): path for path, module in model.named_modules() if path}
            self._paths[id(model)] = paths
        return paths

    def beyond(self, numbers: Iterable[int]) -> list[int]:
        """Those of the layer ``numbers`` that the run has no layer for; empty if it is not known
        how many layers there are."""
        count = len(self._names)
        return [number for number in numbers if count and number >= count]

    def of(self, path: str) -> str:
        """``3``, ``double-3``, ``3.attn2``."""
        if path not in self._names:
            taken = set(self._names.values())
            self._names[path] = next(name for name in _candidates(path) if name not in taken)
        return self._names[path]


class LayerCalls:
    """The attention calls in one call of a diffusion model, layer by layer."""

    def __init__(self, names: Names, model: nn.Module) -> None:
        self._names = names
        self._model = model
        self._calls: Counter[str] = Counter()
        self._unnamed: Counter[str] = Counter()

    def module(self) -> nn.Module | None:
        """The innermost module on the call stack; None if there is none, as in compiled graphs."""
        return next(self._waiting(), None)

    def enter(self, module: nn.Module | None, options: Mapping[str, Any]) -> Layer | None:
        """Count a call of ``module``, which is what :meth:`module` returned. None: it belongs to
        another network, such as a ControlNet."""
        if module is None:
            return self._by_index(options)
        paths = self._names.paths(self._model)
        path = next((paths[id(m)] for m in self._waiting() if id(m) in paths), None)
        if path is None:
            return None
        name = self._names.of(path)
        self._calls[name] += 1
        return Layer(name, self._calls[name] - 1)

    def _by_index(self, options: Mapping[str, Any]) -> Layer:
        """The layer by the model's own block index, and by the order of calls for layers without an
        index and several attentions in one block."""
        index = options.get("block_index")
        block = "" if index is None else f"{options.get('block_type', 'block')}-{index}."
        number = self._unnamed[block]
        self._unnamed[block] += 1
        return Layer(f"{block}{number}", 0)

    def _waiting(self) -> Iterator[nn.Module]:
        """The modules on the call stack that are inside the diffusion model, innermost first. A
        module is recognised as the first argument of its own method."""
        frame = sys._getframe(1)
        for _ in range(DEPTH):
            parent = frame.f_back
            if parent is None:
                return
            frame, code = parent, parent.f_code
            first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(first, nn.Module):
                module: nn.Module = getattr(first, "_orig_mod", first)  # torch.compile wraps them
                if module is self._model or hasattr(module, "diffusion_model"):
                    return
                yield module


def _candidates(path: str) -> Iterator[str]:
    """Names for the module at ``path``, from the shortest to the path itself."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if found := re.fullmatch(r"(.*?)(\d+)", part):
            kind = found[1] or (parts[i - 1] if i else "")
            words = [word for word in kind.split("_") if word and word not in PLAIN]
            block = "-".join(["_".join(words), found[2]] if words else [found[2]])
            yield block
            yield ".".join([block, *parts[i + 1 :]])
            break
    yield path
