"""Where in which sampling run a model call happens, told from the model calls alone.

A pipeline doesn't announce its runs. What it tells differs: Wan's gives a cache context with step
and number of steps, others only the name of the conditioning, a loop of one's own nothing at all.
When in doubt a new run starts, which costs one dense step and never carries state over.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...report.statistics import RunReport
from ...run import Run
from ...schedule import Progress

#: Position of a call before which no noise was removed, where only the noise level is known: the
#: ramp is at its strictest then. (0 itself has no logarithm.)
START = 2.0**-10


class Moment(NamedTuple):
    """What one call of a transformer tells about itself.

    ``stream`` names the conditioning; ``step`` and ``steps`` come from a cache context, or are
    None; ``timestep`` is the noise level, falling over a run; ``schedule`` is the pipeline's own
    list of timesteps, or None, and ``levels`` are the noise levels that follow from it.
    """

    stream: str
    step: int | None
    steps: int | None
    timestep: float
    schedule: Tensor | None
    levels: tuple[float, ...] = ()


class Trajectory:
    """One sampling run of a pipeline, over all its transformers."""

    def __init__(self, first: Moment) -> None:
        self.schedule = first.schedule
        self.runs: dict[str, Run] = {}
        self._noise_levels = first.levels
        self._first = self._last = first
        self._seen: Counter[Hashable] = Counter()
        self._counted = 0

    def continues(self, transformer: str, now: Moment) -> bool:
        """Whether a call still belongs to this run; :meth:`advance` to it then.

        It doesn't if the pipeline made a new schedule, if the noise or the step went back, or if
        the same conditioning comes again at the same place. (Heun's method visits a noise level
        twice, but lists it twice, too.)
        """
        last = self._last
        if now.schedule is not self.schedule or (now.step is None) != (last.step is None):
            return False
        if now.step is not None and last.step is not None:
            return now.step >= last.step and not self._seen[self._key(transformer, now)]
        visits = max(1, self._noise_levels.count(now.timestep))
        back = now.timestep > last.timestep
        return not back and self._seen[self._key(transformer, now)] < visits

    def advance(self, transformer: str, now: Moment) -> Progress:
        """Count a call; its step, and the part of the run that is done after it."""
        self._counted += now.timestep < self._last.timestep
        key = self._key(transformer, now)
        self._seen[key] += 1
        self._last = now
        if now.step is not None and now.steps:
            return Progress(now.step, min(1.0, (now.step + 1) / now.steps))
        if now.timestep in self._noise_levels:
            # Visited again: the next of equal levels in the list.
            visits = min(self._seen[key], self._noise_levels.count(now.timestep))
            step = self._noise_levels.index(now.timestep) + visits - 1
            return Progress(step, (step + 1) / len(self._noise_levels))
        # Not ahead of the step count for evenly spaced noise levels, nor for those that video
        # models use, which stay high for longer.
        removed = 1 - now.timestep / self._first.timestep if self._first.timestep else 0.0
        return Progress(self._counted, max(START, removed))

    def countdown(self) -> Sequence[int]:
        """The steps as a falling schedule for :class:`Run`, empty if their number is unknown."""
        steps = self._first.steps or 0
        if not steps and self.schedule is not None:
            steps = len(set(self.schedule.tolist()))
        return range(steps, -1, -1) if steps else ()

    def report(self) -> RunReport | None:
        """What all transformers did so far; None if none was asked."""
        reports = [run.report() for run in self.runs.values()]
        return _merge(reports) if reports else None

    def finish(self) -> RunReport | None:
        """The last report; all state is dropped."""
        report = self.report()
        for run in self.runs.values():
            run.finish()
        self.runs.clear()
        return report

    @staticmethod
    def _key(transformer: str, now: Moment) -> Hashable:
        return transformer, now.stream, now.timestep if now.step is None else now.step


def name_stream(text: Tensor | tuple[Tensor, ...] | None) -> str:
    """A name for a call without a cache context, from its text states ``[B, L, C]``.

    The text tells the conditionings apart in any order of calls, and stays the same over a run.
    """
    if isinstance(text, tuple):  # text and picture
        text = text[0]
    if text is None:
        return "call"
    values = text.detach().flatten().double()
    weights = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
    return "text-" + struct.pack(">d", float((values * weights).sum())).hex()


def noise_levels(scheduler: Any, level: float, dtype: torch.dtype) -> tuple[float, ...]:
    """The scheduler's noise levels in the form in which a model is told that it is at ``level``.

    Models are told the timestep, the noise's standard deviation sigma, or sigma / (sigma + 1), in
    their own ``dtype``, in which neighbours may coincide. Empty if ``level`` is none of these: the
    caller goes by other noise levels.
    """
    timesteps, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    if not isinstance(timesteps, Tensor):
        return ()
    forms = [timesteps]
    if isinstance(sigmas, Tensor):
        sigmas = sigmas[: len(timesteps)]  # they end with 0, which no model is ever asked about
        forms += [sigmas, sigmas / (sigmas + 1)]
    for form in forms:
        levels = tuple(form.to(dtype).tolist())
        if level in levels:
            return levels
    return ()


def _merge(reports: Sequence[RunReport]) -> RunReport:
    """One report of transformers that took turns in one run."""
    seconds: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    for report in reports:
        seconds.update(report.step_seconds)  # type: ignore[arg-type]
        reasons.update(report.reasons)
    calls = tuple(call for report in reports for call in report.calls)
    return replace(
        reports[0],
        steps=reports[0].steps or max(seconds, default=-1) + 1,
        seconds=max(report.seconds for report in reports),
        step_seconds=dict(seconds),
        calls=calls,
        reasons=dict(reasons),
        maps=tuple(tile_map for report in reports for tile_map in report.maps),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
    )
