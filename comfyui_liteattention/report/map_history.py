"""How the tile maps of a few layers change over the steps, small enough to be kept in every run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..attention import LayerState
from ..tiles import unpack

SIDE = 64  # cells along a map at most: 4 KiB
LAYERS = 4
ALL = 255


class StepMap(NamedTuple):
    """What a layer computed at a step for a conditioning, ``live [<= SIDE, <= SIDE]`` uint8: the
    share of heads, and of the tiles that fall in a cell, in units of 1 / ``ALL``."""

    step: int
    layer: str
    live: Tensor


class MapHistory:
    """Collects the maps of one run, on their own device."""

    def __init__(self) -> None:
        self._chosen: tuple[str, ...] = ()
        self._maps: list[StepMap] = []

    def note(self, step: int, states: Iterable[tuple[str, LayerState]]) -> None:
        """Keep what is live as ``step`` begins in some of the layers, given in the order of
        execution. The layers are chosen once; if few have a map by then, others join later."""
        first: dict[str, LayerState] = {}
        for layer, state in states:
            if state.live is not None:
                first.setdefault(layer, state)
        others = [layer for layer in first if layer not in self._chosen]
        self._chosen += chosen(others, LAYERS - len(self._chosen))
        for layer, state in first.items():
            if layer in self._chosen:
                self._maps.append(StepMap(step, layer, _small(state)))

    def maps(self) -> tuple[StepMap, ...]:
        """All maps, on the CPU, in order of steps and layers."""
        return tuple(one._replace(live=one.live.cpu()) for one in self._maps)


def chosen(layers: Sequence[str], at_most: int = LAYERS) -> tuple[str, ...]:
    """Some of the layers, evenly spaced, including the first and the last."""
    count = min(at_most, len(layers))
    if count < 2:
        return tuple(layers[:count])
    return tuple(layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count))


def small_map(live: Tensor, key_tiles: int) -> Tensor:
    """``live [H, Tq, ceil(Tk / 32)]`` int32 bits -> ``[<= SIDE, <= SIDE]`` uint8.

    One head after the other, so that the memory needed is that of one head's map.
    """
    query_tiles = live.shape[1]
    size = (min(SIDE, query_tiles), min(SIDE, key_tiles))
    total = torch.zeros(size, device=live.device)
    for head in live:
        share = unpack(head[None, None], key_tiles)[0].float()
        total += adaptive_avg_pool2d(share, size)[0]
    return (total * (ALL / len(live))).round().to(torch.uint8)


def share_of_heads(state: LayerState) -> Tensor:
    """What is live in a state, ``[<= SIDE, <= SIDE]`` 0..1, averaged over heads, the batch and the
    tiles that fall in a cell."""
    assert state.live is not None and state.pinned is not None
    return small_map(state.live.flatten(0, 1), state.pinned.shape[1]) / ALL


def _small(state: LayerState) -> Tensor:
    assert state.live is not None and state.pinned is not None
    return small_map(state.live[0], state.pinned.shape[1])
