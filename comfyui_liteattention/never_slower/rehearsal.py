"""Measuring what calls of ours take, once in a process for each kind of call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch

from ..attention import LayerState, Tally
from ..backends.clock import stopwatch
from .costs import Costs, Rehearsal


def rehearse(ask: Callable[[LayerState, float], Tally], device: torch.device) -> Rehearsal:
    """What calls of ours take in the course of a run: ``ask`` makes one with a state and a position
    in the run, for the same tokens each time. Waits for the device."""
    state = LayerState()
    ask(state, 0.5)  # also loads and prepares what the following calls need
    half = ask(state, 1.0)
    watch = stopwatch(device)
    final = ask(state, 1.0)
    final_seconds = watch()
    watch = stopwatch(device)
    ask(LayerState(), 1.0)
    full_seconds = watch()()
    return Rehearsal(full_seconds, final_seconds(), _share(half), _share(final))


def _share(tally: Tally) -> float:
    """Of the tiles, that were computed; with the audit it can come to more than all."""
    return min(float(tally.computed) / tally.total, 1.0)


_decided: dict[Hashable, Costs] = {}
_deciding = threading.Lock()


def decided(key: Hashable, measure: Callable[[], Costs]) -> Costs:
    """The costs of calls of this kind, measured when they are first asked for in this process."""
    with _deciding:
        if key not in _decided:
            _decided[key] = measure()
        return _decided[key]


def forget_decisions() -> None:
    """As in a new process."""
    _decided.clear()
