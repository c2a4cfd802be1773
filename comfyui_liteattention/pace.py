"""Never slower than dense: is skipping worth it on this machine, for this run?

Both ways are timed on the same call early in the run, when all tiles are live. From then on only
the computed fraction has to be watched: with ``ratio`` = our time / the user's own dense attention,
a step at fraction ``f`` costs ``ratio * f`` of a dense one. The same measurements say how many
seconds were saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

#: Share of the run's attention time that may be spent on finding out.
ALLOWANCE = 0.02
#: Layers, in the order of execution, whose first call is timed.
TIMED_LAYERS = 3

Result = TypeVar("Result")


class Pace:
    """Whether one run of ``steps`` steps is worth it. ``reason`` is set once it isn't."""

    def __init__(self, steps: int) -> None:
        self.reason: str | None = None
        self._steps = steps
        self.spent = 0.0  # seconds of dense calls that only told the time
        self._ratios: list[float] = []
        self._rates: list[float] = []
        self._fractions: list[float] = []
        self._tiles: dict[int, tuple[int, int]] = {}

    @property
    def doubtful(self) -> bool:
        """Whether the computed fraction has to be watched."""
        return self.ratio > 1 and self._steps > 0

    @property
    def ratio(self) -> float:
        """Our time over the user's own for a full call, 0 before one was timed.

        The most favourable one: other work on the machine disturbs single measurements. The first
        call doesn't count once there are others: it also loads and prepares things.
        """
        return min(self._ratios[1:] or self._ratios, default=0.0)

    @property
    def dense_rate(self) -> float:
        """Seconds that the user's own attention takes for a tile, 0 before a call was timed.

        The shortest: whatever disturbs a measurement only adds to it, and would be called saved.
        """
        return min(self._rates[1:] or self._rates, default=0.0)

    @property
    def saved(self) -> float | None:
        """Seconds of attention saved in the steps that were counted, estimated; None where nothing
        was timed."""
        if not self._rates:
            return None
        computed, total = map(sum, zip((0, 0), *self._tiles.values(), strict=True))
        return saved_seconds(self.dense_rate, self.ratio, computed, total) - self.spent

    def compare(self, ours: float, dense: float, tiles: int) -> None:
        """Note the seconds of one call with all its tiles live, both ways."""
        self._ratios.append(ours / max(dense, 1e-9))
        self._rates.append(dense / tiles)
        self.spent += dense

    def count(self, step: int, computed: int, total: int) -> None:
        """Note the tiles of one step so far."""
        self._tiles[step] = computed, total

    def end_step(self, fraction: float) -> None:
        """Note the computed fraction of one step."""
        self._fractions.append(fraction)
        if too_slow(self.ratio, self._fractions, self._steps):
            self.reason = (
                "your own attention is faster here: a full call takes "
                f"{self.ratio:.2f} times as long with LiteAttention, which still computes "
                f"{fraction:.0%} of the tiles; switched off for the rest of this run"
            )


def timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """The result, and the seconds it took on the device."""
    _wait(device)
    started = time.perf_counter()
    result = function()
    _wait(device)
    return result, time.perf_counter() - started


def saved_seconds(dense_rate: float, ratio: float, computed: int, total: int) -> float:
    """What ``computed`` of ``total`` tiles save, where a tile of a full call takes ``dense_rate``
    seconds of the user's own attention and ``ratio`` times as many of ours. Negative: lost."""
    return dense_rate * (total - ratio * computed)


def too_slow(ratio: float, fractions: Sequence[float], steps: int) -> bool:
    """Whether to stop: the run is behind by more than the allowance and would end up there.

    ``fractions``: computed fraction of each step so far; ``steps`` of the whole run. What is to
    come is taken to be like the last step, which is the worst case as long as tiles only go.
    """
    allowed = ALLOWANCE * steps
    behind = sum(ratio * f - 1 for f in fractions)
    to_come = (steps - len(fractions)) * (ratio * fractions[-1] - 1)
    return behind > allowed and behind + to_come > allowed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
