"""How much time a run may lose, and has lost, calculated from its tiles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from .costs import Costs

#: Share of the run's attention time that may be lost.
ALLOWANCE = 0.02


class Account:
    """The time that one run may still lose, in units of a tile of the user's own attention.

    For each layer that has begun, the loss of its next call is set aside, as if that skipped no
    more than the one before. So the allowance is never exceeded, however few tiles are skipped,
    unless skipped tiles become live again.
    """

    def __init__(self, costs: Costs, steps: int) -> None:
        self._costs = costs
        self._steps = steps
        self._step_tiles: defaultdict[int, int] = defaultdict(int)
        self._spent = 0.0
        self._aside: dict[Hashable, float] = {}

    @property
    def left(self) -> float:
        """Tiles that may still be lost. A step is taken to have as many as the largest so far."""
        allowance = ALLOWANCE * self._steps * max(self._step_tiles.values(), default=0)
        return allowance - self._spent

    def see(self, step: int, tiles: int) -> None:
        """Count a call of ``tiles`` tiles, whoever computes it."""
        self._step_tiles[step] += tiles

    def covers(self, who: Hashable, tiles: int) -> bool:
        """Whether the allowance covers a call of ``who`` (a layer and its streams); if so, the
        loss of this call and of the next is set aside."""
        if who in self._aside:
            return True
        loss = max(self._loss(tiles, tiles), 0.0)
        if 2 * loss > self.left:  # this call and the next one
            return False
        self._spent += 2 * loss
        self._aside[who] = 2 * loss
        return True

    def settle(self, who: Hashable, tiles: int, computed: int) -> None:
        """Enter a call of ours that computed ``computed`` of its ``tiles``: what it lost, and what
        its next call may lose."""
        loss = self._loss(tiles, computed)
        aside = max(loss, 0.0)
        self._spent += loss + aside - self._aside.get(who, 0.0)
        self._aside[who] = aside

    def _loss(self, tiles: int, computed: int) -> float:
        return (self._costs.of(computed / tiles) - 1) * tiles
