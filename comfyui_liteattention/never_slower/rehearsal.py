"""Timing calls of ours, once per process for each kind of call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import torch

from ..attention import LayerState, Tally
from ..backends.clock import stopwatch
from .costs import Costs, Rehearsal
from .pace import Timed

#: Makes a call of ours with a state, at a position in the run; always with the same q, k and v.
Ask = Callable[[LayerState, float], Tally]


def rehearse(ask: Ask, device: torch.device) -> Rehearsal:
    """Time calls of ours as they would be in the course of a run. Waits for the device."""
    state = LayerState()
    ask(state, 0.5)  # dense; also loads what the timed calls need
    half = ask(state, 1.0)
    watch = stopwatch(device)
    final = ask(state, 1.0)
    final_seconds = watch()
    watch = stopwatch(device)
    ask(LayerState(), 1.0)
    full_seconds = watch()()
    return Rehearsal(full_seconds, final_seconds(), _share(half), _share(final))


def _share(tally: Tally) -> float:
    """Share of the tiles that were computed; with the audit's, it could exceed 1."""
    return min(float(tally.computed) / tally.total, 1.0)


_decided: dict[Hashable, Costs] = {}
_deciding = threading.Lock()


def decided(
    kind: Hashable, ask: Ask, timed: Sequence[Timed], tiles: int, device: torch.device
) -> Costs:
    """The costs of this kind of call, rehearsed the first time it comes up in this process.
    ``ask``: see :func:`rehearse`; its calls have ``tiles`` tiles. ``timed``: calls that the user's
    own attention did."""
    with _deciding:
        if kind not in _decided:
            dense = min(call.seconds() / call.tiles for call in reversed(timed)) * tiles
            _decided[kind] = rehearse(ask, device).costs(dense)
        return _decided[kind]


def forget_decisions() -> None:
    """As in a new process."""
    _decided.clear()
