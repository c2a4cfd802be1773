"""What must never share tiles: the streams of a run.

Guidance often asks the same conditioning more than once for one step, with something left out or
replaced: skip-layer, perturbed-attention, spatio-temporal and modality guidance. Packs do this in
their own ways, some of which nobody outside can see. Two things hold for all of them: within one
evaluation, that is, one time that the sampler asks for the denoised latent, a conditioning is asked
again only to be asked differently; and what is said about it stands in the transformer options.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

#: Options that say when and for whom a model is called, or that the model itself writes: not how.
NOT_HOW = {
    "sigmas",
    "sample_sigmas",
    "uuids",
    "cond_or_uncond",
    "context_window",
    "callbacks",
    "wrappers",
    "optimized_attention_override",
    "prefetch_dynamic_vbars",
    "multigpu_thread_device",
    "multigpu_thread_pool",
    "block_index",
    "block_type",
    "total_blocks",
    "grid_sizes",
    "img_slice",
}
#: What most guiders ask for first, and second.
USUAL = {0: "positive", 1: "negative"}
Window = tuple[int, ...]


class Stream(NamedTuple):
    """``kind``: what the guider calls the conditioning; ``way``: in which of the ways of the run it
    is asked, by the order of their appearance; ``part``: which of several calls of one layer (heads
    or frames, a few at a time)."""

    kind: str
    uuid: Hashable
    window: tuple[int | None, Window] | None
    device: str
    way: int = 0
    part: int = 0

    def __str__(self) -> str:
        name = self.kind
        if self.window is not None:
            frames = self.window[1]
            name += f" {frames[0]}-{frames[-1]}"
        if self.way:
            name += f", guidance pass {self.way}"
        return f"{name}, part {self.part + 1}" if self.part else name


class Streams:
    """The streams of one run, call by call of the model. ``names``: see :func:`names_of`."""

    def __init__(self, names: Mapping[Hashable, str] | None = None) -> None:
        self._names = names or {}
        self._asked: Counter[Hashable] = Counter()
        self._ways: dict[Hashable, int] = {}
        self._announced = False
        self._sigma: float | None = None

    def evaluation(self) -> None:
        """The sampler asks for a denoised latent: all calls until the next time are for that."""
        self._announced = True
        self._asked.clear()

    def of_call(self, options: Mapping[str, Any], device: torch.device) -> list[Stream]:
        """One for each part of the batch of this call."""
        sigma = float(options["sigmas"][0])
        if not self._announced and sigma != self._sigma:
            self._asked.clear()
        self._sigma = sigma
        context = options.get("context_window")
        window = None
        if context is not None:
            window = getattr(context, "dim", None), tuple(context.index_list)
        numbers = options.get("cond_or_uncond") or [0]
        uuids = options.get("uuids") or ()
        if len(uuids) != len(numbers):  # some packs change one and not the other
            uuids = range(len(numbers))
        how = way_of(options)
        return [
            self._stream(Stream(self._kind(number, uuid), uuid, window, str(device)), how)
            for number, uuid in zip(numbers, uuids, strict=True)
        ]

    def _kind(self, number: int, uuid: Hashable) -> str:
        """``number``: where it stood among the conditionings of one question to the model. A guider
        may ask for each by itself, or list the negative one first."""
        usual = USUAL.get(number, f"conditioning {number}")
        return self._names.get(uuid, usual)

    def _stream(self, plain: Stream, how: Hashable) -> Stream:
        turn = self._asked[plain, how]
        self._asked[plain, how] += 1
        return plain._replace(way=self._ways.setdefault((how, turn), len(self._ways)))


def names_of(conds: Any) -> dict[Hashable, str]:
    """What a guider calls its conditionings, by their uuids; ``conds``: lists of them by name."""
    if not isinstance(conds, Mapping):
        return {}
    return {
        cond["uuid"]: str(name)
        for name, some in conds.items()
        for cond in some or ()
        if isinstance(cond, Mapping) and "uuid" in cond
    }


def way_of(options: Mapping[str, Any]) -> Hashable:
    """How a model is called: all options, but for what they are at this moment of the run."""
    return _summary({name: value for name, value in options.items() if name not in NOT_HOW})


def _summary(value: Any, depth: int = 4) -> Hashable:
    """What stays the same from step to step. Numbers don't, such as those of steps, unless they
    stand in a list, such as those of blocks; nor do objects that are made anew for each step."""
    if isinstance(value, (bool, str, type(None))):
        return value
    if depth and isinstance(value, Mapping):
        pairs = ((str(name), _summary(entry, depth - 1)) for name, entry in value.items())
        return tuple(sorted(pairs, key=lambda pair: pair[0]))
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        entries = [e if isinstance(e, int) else _summary(e, depth - 1) for e in value]
        return tuple(sorted(entries, key=str) if isinstance(value, (set, frozenset)) else entries)
    if isinstance(value, partial):
        return _summary([value.func, value.args, value.keywords], depth - 1)
    return _name(value if callable(value) else type(value))


def _name(thing: Any) -> str:
    return getattr(thing, "__qualname__", type(thing).__qualname__)
