"""What a run may lose, and has lost, reckoned from its tiles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

from .costs import Costs

#: Share of the run's attention time that may be lost.
ALLOWANCE = 0.02


class Account:
    """What one run may still lose, in tiles of the user's own attention.

    Each layer that has begun has the loss of its next call put aside, as if that skipped no more
    than the one before. So not more than the allowance is lost, whatever the tiles do, unless
    tiles come back to life.
    """

    def __init__(self, costs: Costs, steps: int) -> None:
        self._costs = costs
        self._steps = steps
        self._step_tiles: defaultdict[int, int] = defaultdict(int)
        self._spent = 0.0
        self._aside: dict[Hashable, float] = {}

    @property
    def left(self) -> float:
        """Tiles that may still be lost; as far as is known, of the largest step so far."""
        allowance = ALLOWANCE * self._steps * max(self._step_tiles.values(), default=0)
        return allowance - self._spent

    def see(self, step: int, tiles: int) -> None:
        """A call of so many tiles comes, whoever does it."""
        self._step_tiles[step] += tiles

    def covers(self, who: Hashable, tiles: int) -> bool:
        """Whether a call of a layer for its streams, ``who``, can be paid for; then it is."""
        if who in self._aside:
            return True
        loss = max(self._loss(tiles, tiles), 0.0)
        if 2 * loss > self.left:  # this call and the next one
            return False
        self._spent += 2 * loss
        self._aside[who] = 2 * loss
        return True

    def settle(self, who: Hashable, tiles: int, computed: int) -> None:
        """A call of ours computed so many of its tiles; what it lost, and may lose next time."""
        loss = self._loss(tiles, computed)
        aside = max(loss, 0.0)
        self._spent += loss + aside - self._aside.get(who, 0.0)
        self._aside[who] = aside

    def _loss(self, tiles: int, computed: int) -> float:
        return (self._costs.of(computed / tiles) - 1) * tiles
