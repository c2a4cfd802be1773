"""Never slower than dense: is skipping worth it on this machine, for this run?

The first calls of a run are left to the user's own attention, which tells what it takes for a tile.
Each call of ours is timed whole, with its audits and all else that it needs. So it is known what
each call took, what it would have taken densely, and what was saved.

Where a full call of ours is the slower one, a few layers begin, and the others wait, densely, until
those few get faster by so much, because of what they skip, that joining them will pay. That costs a
full call of each, and what is lost until they are faster than dense: as many join at a time as the
run can afford. A run that lost its allowance all the same goes on densely.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from .attention import Tally

#: Share of the run's attention time that may be lost.
ALLOWANCE = 0.02
#: Calls at the start that are left to the user's own attention, to be timed.
TIMED_CALLS = 3
#: Layers join in so many groups; each has layers of all depths.
GROUPS = 8
#: Time of a full call of ours over that of a dense one: so little more is soon saved, and all
#: layers begin at once.
AT_ONCE = 1.05
#: Likewise: so much is never saved.
HOPELESS = 2.0
#: Share of what is left of the allowance that may be spent on joining.
STAKE = 0.25
#: A full call takes what it took in the best of so many steps: other work on the machine disturbs
#: single measurements. After so many there is a trend.
REMEMBERED = 3
#: Time over dense below which no trend is believed.
LOWEST = 0.25


class Pace:
    """Which calls of one run are ours. The run has ``steps`` steps; before the step ``first``
    nothing can be marked. ``reason`` is set once none is ours any more."""

    def __init__(self, steps: int, first: int = 0) -> None:
        self.reason: str | None = None
        self._steps = steps
        self._first = first
        self._timed = 0
        self._rates: list[float] = []  # sorted: every call asks for one of them
        self._step_tiles: defaultdict[int, int] = defaultdict(int)
        self._seconds = 0.0
        self._tiles = 0
        self._opening: tuple[float, int] | None = None
        self._step_calls: list[tuple[float, Sequence[Tally]]] = []
        self._ratios: list[float] = []
        self._paces: list[float] = []
        self._first_layer: int | None = None
        self._groups = 1

    @property
    def dense_rate(self) -> float | None:
        """Seconds that the user's own attention takes for a tile, None before a call was timed.

        One of the shorter ones: whatever disturbs a measurement only adds to it, and would be
        called saved. The first doesn't count once there are others: it also loads and prepares
        things.
        """
        return self._rates[len(self._rates) // 4] if self._rates else None

    @property
    def saved(self) -> float | None:
        """Seconds of attention saved so far, estimated; None where nothing was timed."""
        rate = self.dense_rate
        return None if rate is None else rate * self._tiles - self._seconds

    def takes_part(self, layer: int, step: int) -> bool:
        """Whether a call is ours; ``layer`` counts in the order of execution."""
        if self._timed < TIMED_CALLS or step < self._first:
            return False
        if self._first_layer is None:
            self._first_layer = layer
        return (layer - self._first_layer) % GROUPS < self._groups

    def compare(self, step: int, seconds: float, tiles: int) -> None:
        """Note a call that the user's own attention did, and the tiles of its matrix."""
        if self._timed == 1:
            self._rates.clear()
        self._timed += 1
        insort(self._rates, seconds / tiles)
        self._step_tiles[step] += tiles

    def count(self, step: int, seconds: float, tallies: Sequence[Tally]) -> None:
        """Note a call of ours, with a tally for each stream; give up if too much is lost."""
        tiles = _total(tallies)
        self._step_tiles[step] += tiles
        self._seconds += seconds
        self._tiles += tiles
        if self._opening is None:
            self._opening = seconds, tiles
        else:
            self._step_calls.append((seconds, tallies))
        rate = self.dense_rate
        if rate is None:
            return
        if not self._ratios and seconds <= AT_ONCE * rate * tiles:
            self._groups = GROUPS
        if self._left(rate) < 0:
            self._give_up(rate)

    def end_step(self, step: int) -> None:
        """Note that no more calls of this step come; let more layers join if that pays."""
        rate, calls, self._step_calls = self.dense_rate, self._step_calls, []
        if rate is None or not calls:
            return
        seconds = sum(seconds for seconds, _ in calls)
        tallies = [tally for _, tallies in calls for tally in tallies]
        pace = seconds / (rate * _total(tallies))
        ratio = seconds / (rate * sum(int(tally.computed) for tally in tallies))
        self._ratios = [*self._ratios, ratio][-REMEMBERED:]
        self._paces.append(pace)
        if pace > 1 and min(self._ratios) > HOPELESS:
            self._give_up(rate)
        left = self._left(rate) / (rate * self._largest_step())
        full, to_go = self._full_pace(rate), self._steps - step - 1
        self._groups += joining(full, self._paces, to_go, left, self._groups)

    def _full_pace(self, rate: float) -> float:
        """Time of a full call over that of a dense one: that of the first, unless it was slow for
        other reasons. (What is done beside the tiles makes few tiles look dear.)"""
        assert self._opening is not None
        seconds, tiles = self._opening
        return min(seconds / (rate * tiles), *self._ratios)

    def _left(self, rate: float) -> float:
        """Seconds that may still be lost."""
        seconds, tiles = self._counted()
        return ALLOWANCE * rate * self._largest_step() * self._steps - (seconds - rate * tiles)

    def _counted(self) -> tuple[float, int]:
        """Seconds and tiles of our calls, without the first: it loads and prepares things, too, and
        is forgiven."""
        seconds, tiles = self._opening or (0.0, 0)
        return self._seconds - seconds, self._tiles - tiles

    def _largest_step(self) -> int:
        """Tiles of a whole step; as far as known, in the first."""
        return max(self._step_tiles.values())

    def _give_up(self, rate: float) -> None:
        seconds, tiles = self._counted()
        self.reason = (
            f"your own attention is faster here: LiteAttention took {seconds / (rate * tiles):.2f} "
            "times as long; switched off for the rest of this run"
        )


def joining(full: float, paces: Sequence[float], steps: int, left: float, groups: int) -> int:
    """How many more groups of layers join, with ``steps`` steps to go.

    ``full``: time of a full call over that of a dense one; ``paces``: the same for those that skip
    already, at each step so far, of which the trend goes on; ``left``: what may still be lost, in
    dense steps; ``groups``: how many take part, and will lose, too, until they are faster.
    """
    if len(paces) < REMEMBERED or steps < 2:
        return 0
    slope = min(0.0, (paces[-1] - paces[0]) / (len(paces) - 1))
    later = (max(paces[-1] + slope * step, LOWEST) for step in range(2, steps + 1))
    losses = [full - 1, *(pace - 1 for pace in later)]
    if sum(losses) >= 0:
        return 0
    price = sum(loss for loss in losses if loss > 0)
    owed = sum(loss for loss in losses[1:] if loss > 0) * groups / GROUPS
    return GROUPS if price == 0 else max(0, int((STAKE * left - owed) / price * GROUPS))


def _total(tallies: Sequence[Tally]) -> int:
    return sum(tally.total for tally in tallies)


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


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
