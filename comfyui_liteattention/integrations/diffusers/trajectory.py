"""Which sampling run a model call belongs to, and where in it, found out from the calls alone.

A pipeline doesn't announce its runs, and what it does tell differs: Wan's gives a cache context
with step and number of steps, others only the name of the conditioning, a user's own loop nothing.
When in doubt a new run starts, which costs one dense step and never carries state over.
"""

from __future__ import annotations

import struct
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...report.experts import merged
from ...report.statistics import RunReport
from ...run import Run
from ...schedule import Progress, noise_fractions

#: Position given to calls at the first noise level where no schedule is known. Nearly 0, at which
#: the ramp is at its strictest; 0 itself has no logarithm.
START = 2.0**-10
#: How many values of a latent are kept to recognise it.
SKETCH = 1024
#: Latents whose cosine similarity is below this are taken for those of different runs. A step
#: removes only a part of the noise, while the noise of two runs is independent.
SAME_VIDEO = 0.5


class Moment(NamedTuple):
    """What one call of a transformer tells about its place in a run.

    ``stream`` names the conditioning. ``step`` and ``steps`` come from a cache context, or are
    None. ``timestep`` is the noise level, falling over a run. ``schedule`` is the pipeline's own
    list of timesteps, or None, and ``levels`` are the noise levels that follow from it. ``mean`` is
    the noise level averaged over the frames, where each has its own. ``form`` distinguishes passes
    that differ in what is computed rather than in the text. ``latent`` is a :func:`sketch` of the
    model's input. ``fractions`` are the levels as noise fractions.
    """

    stream: str
    step: int | None
    steps: int | None
    timestep: float
    schedule: Tensor | None
    levels: tuple[float, ...] = ()
    mean: float | None = None
    form: Hashable = ()
    latent: Tensor | None = None
    fractions: tuple[float, ...] = ()


class Visit(NamedTuple):
    """Where in its run a call is, and the name of its stream."""

    progress: Progress
    stream: str


@dataclass
class _Place:
    """A place in the run (a step or noise level) that a conditioning has reached: mean noise level
    and latent of its latest visit, the number of visits, and how many passes of each form were made
    on that latent."""

    mean: float | None
    latent: Tensor | None
    visits: int = 1
    passes: Counter[Hashable] = field(default_factory=Counter)


class Trajectory:
    """One sampling run of a pipeline, over all its transformers.

    ``started``: when it began. ``over``: it has ended and its state is freed; a call that comes all
    the same stays dense.
    """

    def __init__(self, first: Moment) -> None:
        self.schedule = first.schedule
        self.runs: dict[str, Run] = {}
        self.over = False
        self.started = time.perf_counter()
        # A run that begins late (video to video) uses only the end of the schedule.
        begin = first.levels.index(first.timestep) if first.timestep in first.levels else 0
        self._noise_levels = first.levels[begin:]
        listed = [] if first.schedule is None else first.schedule.tolist()[begin:]
        #: The step of each timestep. Samplers that evaluate a noise level twice list it twice.
        self._steps = [*accumulate((a != b for a, b in pairwise(listed)), initial=0)]
        self._fractions = first.fractions[begin:]
        self._first = self._last = first
        self._places: dict[Hashable, _Place] = {}
        self._forms: defaultdict[str, list[Hashable]] = defaultdict(list)
        self._streams: defaultdict[int, set[str]] = defaultdict(set)
        self._progress = Progress(0, START)
        self._counted = 0

    def continues(self, transformer: str, now: Moment) -> bool:
        """Whether a call still belongs to this run; if so, :meth:`advance` is to be called.

        It doesn't if the pipeline made a new schedule, if the noise level or the step went back, or
        if the same conditioning comes again at the same place with another latent. (Heun's method
        visits a noise level twice, but lists it twice, too.) With the same latent it is another
        pass of guidance: with skipped layers, or with perturbed attention.
        """
        last = self._last
        if (now.step is None) != (last.step is None):
            return False
        if now.step is not None and last.step is not None:
            back = now.step < last.step
        else:
            back = now.timestep > last.timestep or now.schedule is not self.schedule
            back = back or (now.schedule is None and not _follows(now.latent, last.latent))
        place = self._places.get(_key(transformer, now))
        return not back and (
            place is None or _same(now.latent, place.latent) or self._comes_again(place, now)
        )

    def advance(self, transformer: str, now: Moment) -> Visit:
        """Enter a call; returns its step and position in the run, and its stream."""
        self._counted += now.timestep < self._last.timestep
        self._last = now
        key = _key(transformer, now)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _Place(now.mean, now.latent)
        elif not _same(now.latent, place.latent):
            visits = place.visits + (not _less_noise(now, place))
            place = self._places[key] = _Place(now.mean, now.latent, visits)
        stream = self._name(now, place)
        self._progress = self._locate(now, place.visits)
        self._streams[self._progress.step].add(stream)
        return Visit(self._progress, stream)

    @property
    def complete(self) -> bool:
        """Whether the last step has been done for all streams that the step before it had."""
        step, position = self._progress
        return (
            position >= 1
            and step - 1 in self._streams
            and self._streams[step - 1] <= self._streams[step]
        )

    def countdown(self) -> Sequence[int]:
        """The steps as a falling schedule for :class:`Run`, empty if their number is unknown."""
        steps = self._first.steps or 0
        if not steps and self._noise_levels:
            steps = self._steps[-1] + 1
        return range(steps, -1, -1) if steps else ()

    def levels(self) -> tuple[float, ...]:
        """The noise fraction at the beginning of each step of :meth:`countdown`, and at the end;
        empty if the scheduler doesn't give it."""
        steps = len(self.countdown()) - 1
        listed = [*dict.fromkeys(self._fractions)]
        falls = all(before > after for before, after in pairwise(listed))
        return (*listed[-steps:], 0.0) if falls and 0 < steps <= len(listed) else ()

    def report(self, maps: bool = True) -> RunReport | None:
        """What all transformers did so far, see :meth:`.Run.report`; None before the first call."""
        reports = [run.report(maps) for run in list(self.runs.values())]
        return merged(reports) if reports else None

    def finish(self) -> RunReport | None:
        """Drop all state and return the last report."""
        reports = [run.finish() for run in self.runs.values()]
        self.runs.clear()
        self.over = True
        return merged(reports) if reports else None

    def _locate(self, now: Moment, visits: int) -> Progress:
        if now.step is not None and now.steps:
            return Progress(now.step, min(1.0, (now.step + 1) / now.steps))
        if now.timestep in self._noise_levels:
            # On another visit of a level, take the next of the equal entries in the list.
            visits = min(visits, self._noise_levels.count(now.timestep))
            place = self._noise_levels.index(now.timestep) + visits - 1
            return Progress(self._steps[place], (place + 1) / len(self._noise_levels))
        # Never ahead of the true position, neither for evenly spaced noise levels nor for those
        # of video models, which stay high for longer.
        removed = 1 - now.timestep / self._first.timestep if self._first.timestep else 0.0
        return Progress(self._counted, max(START, removed))

    def _comes_again(self, place: _Place, now: Moment) -> bool:
        """Whether a conditioning may come to this place again with another latent: because the
        schedule lists it again, or because some frames are denoised while others wait."""
        listed = now.step is None and place.visits < self._noise_levels.count(now.timestep)
        return listed or _less_noise(now, place)

    def _name(self, now: Moment, place: _Place) -> str:
        """The stream of a call: its conditioning and, if it has several passes, which of them."""
        form = now.form, place.passes[now.form]
        place.passes[now.form] += 1
        forms = self._forms[now.stream]
        if form not in forms:
            forms.append(form)
        index = forms.index(form)
        return f"{now.stream} pass {index + 1}" if index else now.stream


def name_stream(text: Tensor | tuple[Tensor, ...] | None) -> str:
    """A stream name for a call without a cache context, from its text states ``[B, L, C]``.

    The text stays the same over a run, and tells the conditionings apart whatever their order.
    """
    if isinstance(text, tuple):  # text and picture
        text = text[0]
    if text is None:
        return "call"
    values = text.detach().flatten().double()
    weights = torch.arange(1, values.numel() + 1, dtype=torch.float64, device=values.device)
    return "text-" + struct.pack(">d", float((values * weights).sum())).hex()


def sketch(latent: Tensor) -> Tensor:
    """Some values of the first sample of ``latent [B, ...]``, ``[at most SKETCH]`` float32, to
    recognise it; from the same places in every latent of its size."""
    values = latent[0].detach().reshape(-1)
    return values[:: -(-values.numel() // SKETCH)].to(torch.float32, copy=True)


def noise_levels(scheduler: Any, level: float, dtype: torch.dtype) -> tuple[float, ...]:
    """The scheduler's noise levels in the form in which the model was given ``level``.

    Models are given the timestep, the standard deviation sigma, or sigma / (sigma + 1), in their
    own ``dtype``, in which neighbouring levels may coincide. Empty if ``level`` is none of these,
    because the caller doesn't follow this scheduler.
    """
    timesteps, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    if not isinstance(timesteps, Tensor):
        return ()
    forms = [timesteps]
    if isinstance(sigmas, Tensor):
        sigmas = sigmas[: len(timesteps)]  # without the final 0, at which no model is called
        forms += [sigmas, sigmas / (sigmas + 1)]
    for form in forms:
        levels = tuple(form.to(dtype).tolist())
        if level in levels:
            return levels
    return ()


def _key(transformer: str, now: Moment) -> Hashable:
    return transformer, now.stream, now.timestep if now.step is None else now.step


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two sketches are of the same latent; False if one is missing."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _follows(latent: Tensor | None, before: Tensor | None) -> bool:
    """Whether a latent may follow from the one before; True if one is missing."""
    if latent is None or before is None:
        return True
    if latent.shape != before.shape:
        return False
    return float(F.cosine_similarity(latent, before, dim=0)) >= SAME_VIDEO


def _less_noise(now: Moment, place: _Place) -> bool:
    return now.mean is not None and place.mean is not None and now.mean < place.mean


def fractions_of(scheduler: Any) -> tuple[float, ...]:
    """The noise fraction of the latent at each of the scheduler's timesteps, 0..1; empty if the
    scheduler doesn't give it."""
    timesteps, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    if not isinstance(timesteps, Tensor):
        return ()
    if isinstance(sigmas, Tensor):
        listed = sigmas[: len(timesteps)].double()
        return noise_fractions(listed.tolist(), flow=bool(listed.max() <= 1))
    kept = getattr(scheduler, "alphas_cumprod", None)  # the signal's share of the variance
    if not isinstance(kept, Tensor):
        return ()
    signal = kept.double()[timesteps.long().cpu()].clamp(min=1e-12)
    return noise_fractions(((1 - signal) / signal).sqrt().tolist(), flow=False)
