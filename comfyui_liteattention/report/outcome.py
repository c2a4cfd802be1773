"""The figures of attention calls, which stay on the device while the model runs.

When the model has returned, the figures of all its calls come to the host in one copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import Tally
from ..schedule import Progress
from .statistics import CallStats


class Outcome(NamedTuple):
    """One attention call of one or more streams.

    ``tokens`` and ``tallies``: one per stream. ``seconds()``: the time of the whole call.
    ``extremes``: the minimum and the maximum of each stream's result, at least one of which is not
    finite if any value is not; empty where the user's own attention did the call.
    """

    progress: Progress
    layer: str
    streams: tuple[Hashable, ...]
    tokens: tuple[int, ...]
    tallies: tuple[Tally, ...]
    seconds: Callable[[], float]
    extremes: tuple[Tensor, ...] = ()

    @property
    def tiles(self) -> int:
        """Tiles of the attention matrices of all streams."""
        return sum(tally.total for tally in self.tallies)


class Seen(NamedTuple):
    """An outcome on the host: whether the result was finite, and its statistics."""

    outcome: Outcome
    finite: bool
    calls: tuple[CallStats, ...]


def extremes(out: Tensor) -> tuple[Tensor, ...]:
    """Minimum and maximum, in one pass and without a copy, unlike ``torch.isfinite(out).all()``."""
    return tuple(torch.aminmax(out))


def look(outcomes: Sequence[Outcome]) -> list[Seen]:
    """Bring all figures to the host. Waits for the device, once."""
    figures = [_figures(outcome) for outcome in outcomes]
    there = [value for some in figures for value in some if isinstance(value, Tensor)]
    values = iter(torch.stack([value.double() for value in there]).tolist() if there else ())
    known = [
        [next(values) if isinstance(value, Tensor) else value for value in some] for some in figures
    ]
    # The last call first: once its time is known, so are all others, and only it is waited for.
    seconds = [outcome.seconds() for outcome in reversed(outcomes)][::-1]
    return [
        _seen(outcome, some, taken)
        for outcome, some, taken in zip(outcomes, known, seconds, strict=True)
    ]


def _figures(outcome: Outcome) -> list[Tensor | float | None]:
    """The extremes, then three figures for each stream."""
    tallies = [figure for t in outcome.tallies for figure in (t.computed, t.lost, t.bound)]
    return [*outcome.extremes, *tallies]


def _seen(outcome: Outcome, figures: Sequence[float | None], seconds: float) -> Seen:
    count = len(outcome.extremes)
    share = seconds / len(outcome.streams)
    calls = []
    for i, stream in enumerate(outcome.streams):
        computed, lost, bound = figures[count + 3 * i : count + 3 * i + 3]
        assert computed is not None
        calls.append(
            CallStats(
                step=outcome.progress.step,
                layer=outcome.layer,
                stream=str(stream),
                tokens=outcome.tokens[i],
                computed=int(computed),
                total=outcome.tallies[i].total,
                lost=lost,
                bound=bound,
                seconds=share,
                waits=not count,
            )
        )
    finite = all(value is not None and math.isfinite(value) for value in figures[:count])
    return Seen(outcome, finite, tuple(calls))
