"""What each step of a run may lose, from a budget or from a closeness. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .budget.closeness import GUIDANCE, allowed_losses
from .budget.ledger import MARGIN, allowance
from .schedule import Progress
from .settings import Settings


@dataclass(frozen=True)
class Plan:
    """``levels``: the falling noise levels of the run, see :func:`schedule.noise_fractions`.
    ``known``: whether the run has exactly these steps; False if their number is assumed.
    ``guidance``: its strength, 1 without."""

    settings: Settings
    levels: tuple[float, ...]
    known: bool
    guidance: float = GUIDANCE

    def aim(self, progress: Progress) -> float | None:
        """The lost mass to aim at when marking tiles at this step, which are skipped from the next
        step on; None where the settings give a threshold instead."""
        if self.settings.closeness is not None:
            steps = len(self._losses)
            done = progress.step + 1 if self.known else int(progress.position * steps)
            return self._losses[min(done, steps - 1)]
        if self.settings.budget is not None:
            # Below the allowance, because the loss is known from samples only.
            return MARGIN * allowance(self.settings.budget, self.settings.ramp, progress.position)
        return None

    @property
    def allowed(self) -> tuple[float, ...]:
        """The lost mass allowed at each step; empty with a threshold, and with a budget in a run
        of unknown length."""
        if self.settings.closeness is not None:
            return self._losses
        if self.settings.budget is None or not self.known:
            return ()
        steps = len(self.levels) - 1
        budget, ramp = self.settings.budget, self.settings.ramp
        return tuple(allowance(budget, ramp, (step + 0.5) / steps) for step in range(steps))

    @cached_property
    def _losses(self) -> tuple[float, ...]:
        assert self.settings.closeness is not None
        return allowed_losses(self.settings.closeness, self.levels, self.guidance)
