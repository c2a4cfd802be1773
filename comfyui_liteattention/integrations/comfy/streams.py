"""The streams of a run: calls of the model that must never share tile maps.

Guidance often evaluates the same conditioning more than once per step, with something left out or
replaced: skip-layer, perturbed-attention, spatio-temporal and modality guidance. Packs do this in
their own ways, some of which can't be seen from outside. Two things hold for all of them. Within
one evaluation (the sampler asking once for the denoised latent) a conditioning is repeated only to
be computed differently. And what differs, if it can be seen at all, is in the transformer options.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

#: Options that say when and for which conditioning a model is called, or that the model itself
#: writes, rather than how it computes.
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
    """``kind``: the guider's name for the conditioning. ``way``: numbers the ways in which guidance
    computes it, in the order in which they come up in the run. ``part``: numbers several calls of
    one layer (a few heads or frames at a time)."""

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
        """The sampler asks for a denoised latent; the calls until the next time belong to it."""
        self._announced = True
        self._asked.clear()

    def of_call(self, options: Mapping[str, Any], device: torch.device) -> list[Stream]:
        """The stream of each part of the batch of this call."""
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
    """A guider's names for its conditionings, by uuid; ``conds``: its conditionings by name."""
    if not isinstance(conds, Mapping):
        return {}
    return {
        cond["uuid"]: str(name)
        for name, some in conds.items()
        for cond in some or ()
        if isinstance(cond, Mapping) and "uuid" in cond
    }


def way_of(options: Mapping[str, Any]) -> Hashable:
    """How a model is called: its options, without what changes from step to step."""
    return _summary({name: value for name, value in options.items() if name not in NOT_HOW})


def _summary(value: Any, depth: int = 4) -> Hashable:
    """What of an option stays the same from step to step. Single numbers are left out, since they
    may be step numbers; numbers in a list are kept, since they may be blocks to skip. Of objects,
    which may be created anew for each step, only the name counts."""
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
