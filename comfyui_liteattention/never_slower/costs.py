"""What calls of ours cost relative to the user's own attention, and when it pays to begin. Pure
functions."""

from __future__ import annotations

from typing import NamedTuple

#: Below this share of skipped tiles, the time that they save is lost in the noise of the clock.
FEW = 0.02


class Costs(NamedTuple):
    """Time of our calls divided by that of the user's own: ``full`` with all tiles computed,
    ``floor`` extrapolated to none. ``half`` and ``final``: shares of the tiles that are computed
    in the middle of a run and at its end."""

    full: float
    floor: float
    half: float
    final: float

    def of(self, fraction: float) -> float:
        """Relative time of a call that computes a ``fraction`` of its tiles."""
        return self.floor + (self.full - self.floor) * fraction

    def at(self, done: float) -> float:
        """Relative time of a call when the fraction ``done`` of the run is done, 0..1."""
        if done < 0.5:
            return self.of(1 - 2 * done * (1 - self.half))
        return self.of(self.half - (2 * done - 1) * (self.half - self.final))


class Rehearsal(NamedTuple):
    """Seconds of a call of ours with all tiles computed (``full``) and of one with the skipping
    allowed at the end of a run (``final``); ``half`` and ``final`` as in :class:`Costs`."""

    full_seconds: float
    final_seconds: float
    half: float
    final: float

    def costs(self, dense_seconds: float) -> Costs:
        """``dense_seconds``: time of the user's own attention for the same call."""
        full, last, skipped = self.full_seconds, self.final_seconds, 1 - self.final
        # Noise can put it below 0, or above the time of a call that does compute tiles.
        floor = (last - self.final * full) / skipped if skipped > FEW else 0.0
        floor = min(max(floor, 0.0), last, full)
        return Costs(full / dense_seconds, floor / dense_seconds, self.half, self.final)


def first_step(costs: Costs, steps: int, first: int = 0) -> int | None:
    """The step, ``first`` or later, at which a run of ``steps`` steps should begin so that it takes
    least time; None if the user's own attention alone is faster. (The first call is a full one.)"""
    best, found, later = float(steps), None, 0.0
    for step in reversed(range(first, steps)):
        total = step + costs.full + later
        if total < best:
            best, found = total, step
        later += costs.at(step / steps)
    return found
