"""What a run did, call by call, kept for its report and for the line about each step."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from ..attention import Named
from ..plan import Plan
from ..settings import describe
from .map_history import MapHistory, share_of_heads
from .statistics import CallStats, MapStats, RunReport, fraction, mean_lost, saving

log = logging.getLogger(__name__)


class Record:
    """Calls, seconds, reasons and maps of one run of ``steps`` steps. Not thread-safe."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self.reasons: Counter[str] = Counter()
        self._plan = plan
        self._steps = steps
        self._calls: list[CallStats] = []
        self._step_seconds: defaultdict[int, float] = defaultdict(float)
        self._rates: list[float] = []
        self._seconds = 0.0
        self._tiles = 0
        self._history = MapHistory()
        self._step = 0
        self._started = time.perf_counter()

    def decline(self, reason: str) -> bool:
        """Count a call that stays dense; True the first time this reason is seen."""
        self.reasons[reason] += 1
        return self.reasons[reason] == 1

    def add(self, calls: Sequence[CallStats]) -> None:
        """Add one attention call, as one entry per stream."""
        self._calls += calls
        seconds = sum(call.seconds for call in calls)
        tiles = sum(call.total for call in calls)
        if calls[0].waits:
            self._rates.append(seconds / tiles)
        else:
            self._seconds += seconds
            self._tiles += tiles

    def time_step(self, step: int, seconds: float) -> None:
        """Add the wall time of one call of the model to its step."""
        self._step_seconds[step] += seconds

    def begin_step(self, step: int, states: Iterable[Named]) -> None:
        """Keep small maps of what is live as a new step begins; ``states``: the layers in the order
        of execution."""
        if step <= self._step:
            return
        self._step = step
        try:
            self._history.note(step, [(one.layer, one.state) for one in states])
        except RuntimeError as error:  # most likely out of memory; one picture fewer
            log.warning("LiteAttention: no maps of step %d: %s", step + 1, error)

    @property
    def dense_rate(self) -> float | None:
        """Seconds that the user's own attention takes per tile, None where no call was timed.

        The lower quartile of the measurements: a disturbance only makes them longer, and would look
        like time saved. The first one is left out if there are others, because it includes loading.
        """
        rates = sorted(self._rates[1:] or self._rates)
        return rates[len(rates) // 4] if rates else None

    def text(self, step: int) -> str:
        """One line about a step that just ended, for people who are waiting."""
        calls = [call for call in self._calls if call.step == step]
        if not calls:
            return f"inactive: {next(iter(self.reasons), 'nothing to skip yet')}"
        begin = f"step {step + 1}/{max(self._steps, 1)}: "
        if all(call.waits for call in calls):
            return begin + [*self.reasons][-1]
        lost, rate = mean_lost(calls), self.dense_rate
        return (
            f"{begin}{1 - fraction(calls):.0%} skipped"
            + ("" if lost is None else f", {lost:.2%} lost")
            + ("" if rate is None else f", {saving(rate * self._tiles - self._seconds)}")
        )

    def report(
        self,
        backend: str,
        states: Iterable[Named] | None,
        stopped: str | None,
        notes: Sequence[str],
    ) -> RunReport:
        """What the run did, on ``backend``; ``states``: its skip state, for the maps; None for a
        report without them."""
        return RunReport(
            settings=describe(self._plan.settings),
            backend=backend,
            steps=self._steps,
            seconds=time.perf_counter() - self._started,
            step_seconds=dict(self._step_seconds),
            calls=tuple(self._calls),
            reasons=dict(self.reasons),
            maps=() if states is None else _maps(states),
            history=() if states is None else self._history.maps(),
            allowed=self._plan.allowed,
            levels=self._plan.levels,
            guidance=self._plan.guidance,
            stopped=stopped,
            notes=tuple(notes),
            dense_rate=self.dense_rate,
        )

    def remnant(self, backend: str, error: Exception) -> RunReport:
        """What is left to report if :meth:`report` failed with ``error``."""
        return RunReport(
            settings=describe(self._plan.settings),
            backend=backend,
            steps=self._steps,
            seconds=time.perf_counter() - self._started,
            step_seconds=dict(self._step_seconds),
            calls=(),
            reasons=dict(self.reasons),
            maps=(),
            notes=(f"the report of this run could not be made: {type(error).__name__}: {error}",),
        )

    def clear(self) -> None:
        """Free the memory of calls and maps."""
        self._calls.clear()
        self._history = MapHistory()


def _maps(states: Iterable[Named]) -> tuple[MapStats, ...]:
    """Final tile maps, averaged over heads and batch, small and on the host; none if making them
    fails."""
    try:
        return tuple(
            MapStats(one.layer, one.stream, one.tokens, share_of_heads(one.state).cpu())
            for one in states
            if one.state.live is not None
        )
    except RuntimeError as error:  # most likely out of memory
        log.warning("LiteAttention: no maps of this run: %s", error)
        return ()
