"""What calls of ours take beside the user's own attention, and when it pays to begin. Pure
functions."""

from __future__ import annotations

from typing import NamedTuple

#: From a smaller share of skipped tiles nothing is concluded about what they save.
FEW = 0.02


class Costs(NamedTuple):
    """Time of calls of ours over that of the user's own: ``full``, and ``floor``, as if no tile
    were computed. ``half`` and ``final``: shares of the tiles computed at the skipping allowed in
    the middle of a run and at its end."""

    full: float
    floor: float
    half: float
    final: float

    def of(self, fraction: float) -> float:
        """Time over dense of a call that computes a ``fraction`` of its tiles."""
        return self.floor + (self.full - self.floor) * fraction

    def at(self, done: float) -> float:
        """Time over dense of a call when the part ``done`` of the run is done, 0..1."""
        if done < 0.5:
            return self.of(1 - 2 * done * (1 - self.half))
        return self.of(self.half - (2 * done - 1) * (self.half - self.final))


class Rehearsal(NamedTuple):
    """What calls of ours take: ``full`` and ``final`` seconds of one in which all tiles are
    computed, and one at the skipping allowed at the end of a run; the shares of the tiles that are
    computed in the middle and at the end."""

    full_seconds: float
    final_seconds: float
    half: float
    final: float

    def costs(self, dense_seconds: float) -> Costs:
        """``dense_seconds``: of the user's own attention for the same call."""
        full, last, skipped = self.full_seconds, self.final_seconds, 1 - self.final
        # Below 0, or above the time of a call that does compute tiles, it is noise.
        floor = (last - self.final * full) / skipped if skipped > FEW else 0.0
        floor = min(max(floor, 0.0), last, full)
        return Costs(full / dense_seconds, floor / dense_seconds, self.half, self.final)


def first_step(costs: Costs, steps: int, first: int = 0) -> int | None:
    """The step, ``first`` or later, at which a run of ``steps`` has to begin to be the fastest;
    None if the user's own attention alone is. (A layer's first call is full.)"""
    best, found, later = float(steps), None, 0.0
    for step in reversed(range(first, steps)):
        total = step + costs.full + later
        if total < best:
            best, found = total, step
        later += costs.at(step / steps)
    return found
