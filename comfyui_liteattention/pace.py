"""Never slower than dense: is skipping worth it on this machine, for this run?

A few calls of the first step are done both ways, which tells what the user's own attention takes
for a tile. Each call of ours is timed whole, with its audits and all else that it needs. So it is
known what a step took, what it would have taken densely, and what was saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

#: Share of the run's attention time that may be lost before anything is decided.
ALLOWANCE = 0.02
#: Share of it that may be lost in the hope of gaining later; of a run of few steps, this part of
#: one step.
LIMIT = 0.1
LIMIT_OF_STEP = 0.4
#: Layers, in the order of execution, whose first call is also done densely.
TIMED_LAYERS = 3
#: Computed fraction that is hoped for while nothing could be skipped yet.
HOPED = 0.5
#: Computed fraction below which no trend is believed.
LOWEST = 0.25


class Pace:
    """Whether one run of ``steps`` steps, the first ``dense_steps`` of them without skipping, is
    worth it. ``reason`` is set once it isn't."""

    def __init__(self, steps: int, dense_steps: int = 1) -> None:
        self.reason: str | None = None
        self.spent = 0.0  # seconds of dense calls that only told the time
        self._steps = steps
        self._dense_steps = dense_steps
        self._rates: list[float] = []
        self._taken: dict[int, tuple[float, int]] = {}  # by step: seconds and tiles of all calls
        self._fractions: list[float] = []
        self._paces: list[float] = []

    @property
    def dense_rate(self) -> float | None:
        """Seconds that the user's own attention takes for a tile, None before a call was timed.

        The shortest: whatever disturbs a measurement only adds to it, and would be called saved.
        The first doesn't count once there are others: it also loads and prepares things.
        """
        return min(self._rates[1:] or self._rates, default=None)

    @property
    def saved(self) -> float | None:
        """Seconds of attention saved so far, estimated; None where nothing was timed."""
        if self.dense_rate is None:
            return None
        seconds, tiles = map(sum, zip((0.0, 0), *self._taken.values(), strict=True))
        return self.dense_rate * tiles - seconds - self.spent

    def compare(self, dense: float, tiles: int) -> None:
        """Note the seconds that the user's own attention took for a call of so many tiles."""
        self._rates.append(dense / tiles)
        self.spent += dense

    def count(self, step: int, seconds: float, tiles: int) -> None:
        """Note one call of ours: its seconds, and the tiles of its matrix."""
        before = self._taken.get(step, (0.0, 0))
        self._taken[step] = before[0] + seconds, before[1] + tiles

    def end_step(self, step: int, fraction: float) -> None:
        """Note the computed fraction of a step; decide whether to go on."""
        if self.dense_rate is None or step not in self._taken:
            return
        seconds, tiles = self._taken[step]
        self._fractions.append(fraction)
        self._paces.append(seconds / (self.dense_rate * tiles))
        if too_slow(self._paces, self._fractions, self._steps, self._dense_steps):
            self.reason = (
                "your own attention is faster here: computing a tile takes "
                f"{full_pace(self._paces, self._fractions):.2f} times as long with LiteAttention, "
                f"which still computes {fraction:.0%} of them; switched off for the rest of this "
                "run"
            )


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Starts now; what it returns says how many seconds the device has worked since, and waits for
    it."""
    if device.type != "cuda":
        started = time.perf_counter()
        return lambda: time.perf_counter() - started
    start = _event(device)

    def read() -> float:
        end = _event(device)
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return read


def full_pace(paces: Sequence[float], fractions: Sequence[float]) -> float:
    """Our time over dense for a tile that is computed, from the time over dense of each step and
    the fraction that it computed.

    The best of the last three steps: other work on the machine disturbs single measurements, and
    what is done beside the tiles weighs more the fewer they are.
    """
    return min(p / f for p, f in zip(paces[-3:], fractions[-3:], strict=True))


def too_slow(
    paces: Sequence[float], fractions: Sequence[float], steps: int, dense_steps: int = 1
) -> bool:
    """Whether to stop: the run is behind by more than the allowance, still slower than dense, and
    would lose more by going on, or is so far behind that no prospect is worth it.

    A run that is faster than dense by now goes on, however far behind: tiles only go, so that each
    step wins some of it back.

    ``paces``: time over dense of each step so far, ``fractions`` what it computed; ``steps`` of the
    whole run, of which ``dense_steps`` at the start say nothing about what will be skipped.
    """
    behind = sum(p - 1 for p in paces)
    if behind <= ALLOWANCE * steps or paces[-1] < 1:
        return False
    remaining = steps - len(paces)
    if len(paces) <= dense_steps:
        expected = [HOPED] * remaining
    else:
        expected = trend(fractions, remaining)
    ratio = full_pace(paces, fractions)
    to_come = sum(ratio * f - 1 for f in expected)
    return to_come >= 0 or behind > max(LIMIT * steps, LIMIT_OF_STEP)


def trend(fractions: Sequence[float], steps: int) -> list[float]:
    """Computed fractions of ``steps`` more steps, if they go on to fall as in the later half of
    those known. Never above the last one: tiles only go, but for a few."""
    middle = (len(fractions) - 1) // 2
    distance = len(fractions) - 1 - middle
    slope = min(0.0, (fractions[-1] - fractions[middle]) / distance) if distance else 0.0
    lowest = min(LOWEST, fractions[-1])
    return [max(fractions[-1] + slope * step, lowest) for step in range(1, steps + 1)]


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
