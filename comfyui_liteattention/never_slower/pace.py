"""Which calls of a run LiteAttention computes, and which the user's own attention does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from .account import Account
from .costs import Costs, first_step

#: Calls at the start of a run that the user's own attention does, timed.
TIMED_CALLS = 3
#: Steps assumed for a run that doesn't say how many it has.
UNKNOWN_STEPS = 8

LOST = (
    "too little could be skipped: LiteAttention takes longer than it saves; switched off for the "
    "rest of this run"
)


class Timed(NamedTuple):
    """A call that the user's own attention did; ``seconds()`` gives its time once it is known."""

    step: int
    tiles: int
    seconds: Callable[[], float]


class Pace:
    """Which calls of one run, on one device, are ours. The run has ``steps`` steps, 0 if that isn't
    known; before the step ``first`` no tile can be marked.

    ``timed``: the calls at the start that the user's own attention did. ``reason`` is set once all
    further calls are left to it; ``note`` says what was decided.
    """

    def __init__(self, steps: int, first: int = 0) -> None:
        self.timed: list[Timed] = []
        self.reason: str | None = None
        self.note: str | None = None
        self._steps = steps or UNKNOWN_STEPS
        self._first = first
        self._start = first
        self._account: Account | None = None

    @property
    def times(self) -> bool:
        """Whether the user's own attention does the next call, to be timed."""
        return len(self.timed) < TIMED_CALLS

    @property
    def due(self) -> bool:
        """Whether enough calls were timed, and nothing has been decided yet."""
        return not self.times and self._account is None and self.reason is None

    def decide(self, costs: Costs) -> None:
        """Begin at the step that pays best, or not at all."""
        start = first_step(costs, self._steps, self._first)
        if start is None:
            self.reason = (
                "your own attention is faster here: a full call of LiteAttention takes "
                f"{costs.full:.2f} times as long; switched off"
            )
            return
        self._start = start
        self._account = Account(costs, self._steps)
        for call in self.timed:
            self._account.see(call.step, call.tiles)
        self.note = (
            f"a full call of LiteAttention takes {costs.full:.2f} times as long as one of your own "
            f"attention: it begins at step {start + 1} (decided once, from calls timed in the "
            "first run)"
        )

    def takes_part(self, who: Hashable, step: int, tiles: int) -> bool:
        """Whether a call of ``tiles`` tiles by ``who`` (a layer and its streams) is ours."""
        if self._account is None:
            return False
        self._account.see(step, tiles)
        return step >= self._start and self._account.covers(who, tiles)

    def settle(self, who: Hashable, tiles: int, computed: int) -> None:
        """Enter the tiles of a call of ours; gives up once the allowance is used up."""
        if self._account is None:
            return
        self._account.settle(who, tiles, computed)
        if self._account.left < 0:
            self.reason = LOST
