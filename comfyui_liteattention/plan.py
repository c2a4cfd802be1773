"""What may be lost at each step of one run: from a budget, or from a closeness. Pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .budget.closeness import allowed_losses
from .budget.ledger import MARGIN, allowance
from .schedule import Progress
from .settings import Settings


@dataclass(frozen=True)
class Plan:
    """``levels``: the falling noise levels of the run, see :func:`schedule.noise_fractions`.
    ``known``: whether the run follows them step by step."""

    settings: Settings
    levels: tuple[float, ...]
    known: bool

    def aim(self, progress: Progress) -> float | None:
        """Lost mass to aim at with what is marked now, which is skipped from the next step on; None
        where a threshold rules."""
        if self.settings.closeness is not None:
            steps = len(self._losses)
            done = progress.step + 1 if self.known else int(progress.position * steps)
            return self._losses[min(done, steps - 1)]
        if self.settings.budget is not None:
            # Below what is allowed: what will be measured are samples.
            return MARGIN * allowance(self.settings.budget, self.settings.ramp, progress.position)
        return None

    @property
    def allowed(self) -> tuple[float, ...]:
        """Lost mass that each step may have on average over it; empty without a budget."""
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
        return allowed_losses(self.settings.closeness, self.levels)
