"""Where in which sampling run a model call happens, told from the model calls alone.

A pipeline doesn't announce its runs. What it tells differs: Wan's gives a cache context with step
and number of steps, others only the name of the conditioning, a loop of one's own nothing at all.
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

#: Position of a call before which no noise was removed, where only the noise level is known: the
#: ramp is at its strictest then. (0 itself has no logarithm.)
START = 2.0**-10
#: Values of a latent that are kept to know it again.
SKETCH = 1024
#: Two latents that correlate less than this don't follow each other: a step takes away a part of
#: the noise, while another run's noise has nothing to do with this one's.
SAME_VIDEO = 0.5


class Moment(NamedTuple):
    """What one call of a transformer tells about itself.

    ``stream`` names the conditioning; ``step`` and ``steps`` come from a cache context, or are
    None; ``timestep`` is the noise level, falling over a run; ``schedule`` is the pipeline's own
    list of timesteps, or None, and ``levels`` are the noise levels that follow from it. ``mean`` is
    the noise level's mean over the frames, where each has its own. ``form`` tells passes apart that
    differ in what is computed rather than in the text. ``latent`` is a :func:`sketch` of what the
    model is given. ``fractions`` are the levels as parts of the latent.
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
    """Where a call is in its run, and the name of its stream there."""

    progress: Progress
    stream: str


@dataclass
class _Place:
    """A place in the run that a conditioning came to: its latest visit there, with the noise and
    the latent of that, and how many passes of each form were made on this latent."""

    mean: float | None
    latent: Tensor | None
    visits: int = 1
    passes: Counter[Hashable] = field(default_factory=Counter)


class Trajectory:
    """One sampling run of a pipeline, over all its transformers.

    ``started``: the time then. ``over``: nothing more is expected, and the runs are gone; what
    comes all the same stays dense.
    """

    def __init__(self, first: Moment) -> None:
        self.schedule = first.schedule
        self.runs: dict[str, Run] = {}
        self.over = False
        self.started = time.perf_counter()
        # A run that begins late, as from a video, is asked about the last ones alone.
        begin = first.levels.index(first.timestep) if first.timestep in first.levels else 0
        self._noise_levels = first.levels[begin:]
        listed = [] if first.schedule is None else first.schedule.tolist()[begin:]
        #: The step of each timestep. Samplers that ask twice about a noise level list it twice.
        self._steps = [*accumulate((a != b for a, b in pairwise(listed)), initial=0)]
        self._fractions = first.fractions[begin:]
        self._first = self._last = first
        self._places: dict[Hashable, _Place] = {}
        self._forms: defaultdict[str, list[Hashable]] = defaultdict(list)
        self._streams: defaultdict[int, set[str]] = defaultdict(set)
        self._progress = Progress(0, START)
        self._counted = 0

    def continues(self, transformer: str, now: Moment) -> bool:
        """Whether a call still belongs to this run; :meth:`advance` to it then.

        It doesn't if the pipeline made a new schedule, if the noise or the step went back, or if
        the same conditioning comes again at the same place with another latent. (Heun's method
        visits a noise level twice, but lists it twice, too.) With the same latent it is another
        pass: guidance by skipped layers, or by perturbed attention.
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
        """Count a call; its step, the part of the run that is done after it, and its stream."""
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
        """Whether the last step was made for all streams that the step before it had."""
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
        """The noise at the beginning of each step of :meth:`countdown`, and at the end; empty where
        a scheduler doesn't tell."""
        steps = len(self.countdown()) - 1
        listed = [*dict.fromkeys(self._fractions)]
        falls = all(before > after for before, after in pairwise(listed))
        return (*listed[-steps:], 0.0) if falls and 0 < steps <= len(listed) else ()

    def report(self, maps: bool = True) -> RunReport | None:
        """What all transformers did so far, see :meth:`.Run.report`; None if none was asked."""
        reports = [run.report(maps) for run in list(self.runs.values())]
        return merged(reports) if reports else None

    def finish(self) -> RunReport | None:
        """The last report; all state is dropped."""
        reports = [run.finish() for run in self.runs.values()]
        self.runs.clear()
        self.over = True
        return merged(reports) if reports else None

    def _locate(self, now: Moment, visits: int) -> Progress:
        if now.step is not None and now.steps:
            return Progress(now.step, min(1.0, (now.step + 1) / now.steps))
        if now.timestep in self._noise_levels:
            # Visited again: the next of equal levels in the list.
            visits = min(visits, self._noise_levels.count(now.timestep))
            place = self._noise_levels.index(now.timestep) + visits - 1
            return Progress(self._steps[place], (place + 1) / len(self._noise_levels))
        # Not ahead of the step count for evenly spaced noise levels, nor for those that video
        # models use, which stay high for longer.
        removed = 1 - now.timestep / self._first.timestep if self._first.timestep else 0.0
        return Progress(self._counted, max(START, removed))

    def _comes_again(self, place: _Place, now: Moment) -> bool:
        """Whether a conditioning may be at this place again with another latent: the schedule lists
        it again, or some frames have become less noisy while others wait."""
        listed = now.step is None and place.visits < self._noise_levels.count(now.timestep)
        return listed or _less_noise(now, place)

    def _name(self, now: Moment, place: _Place) -> str:
        """The stream of a call: its conditioning, and which of several passes with that it is."""
        form = now.form, place.passes[now.form]
        place.passes[now.form] += 1
        forms = self._forms[now.stream]
        if form not in forms:
            forms.append(form)
        index = forms.index(form)
        return f"{now.stream} pass {index + 1}" if index else now.stream


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


def sketch(latent: Tensor) -> Tensor:
    """Some values of the first sample of ``latent [B, ...]``, ``[at most SKETCH]`` float32, to know
    it by: the same ones for every latent of its size."""
    values = latent[0].detach().reshape(-1)
    return values[:: -(-values.numel() // SKETCH)].to(torch.float32, copy=True)


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


def _key(transformer: str, now: Moment) -> Hashable:
    return transformer, now.stream, now.timestep if now.step is None else now.step


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two sketches are of one latent; not if one is missing."""
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a, b)


def _follows(latent: Tensor | None, before: Tensor | None) -> bool:
    """Whether a latent can come of the one before it; yes where that isn't known."""
    if latent is None or before is None:
        return True
    if latent.shape != before.shape:
        return False
    return float(F.cosine_similarity(latent, before, dim=0)) >= SAME_VIDEO


def _less_noise(now: Moment, place: _Place) -> bool:
    return now.mean is not None and place.mean is not None and now.mean < place.mean


def fractions_of(scheduler: Any) -> tuple[float, ...]:
    """The part of the latent that is noise at each of the scheduler's timesteps, 0..1; empty where
    it doesn't tell."""
    timesteps, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    if not isinstance(timesteps, Tensor):
        return ()
    if isinstance(sigmas, Tensor):
        listed = sigmas[: len(timesteps)].double()
        return noise_fractions(listed.tolist(), flow=bool(listed.max() <= 1))
    kept = getattr(scheduler, "alphas_cumprod", None)  # part of the signal's variance
    if not isinstance(kept, Tensor):
        return ()
    signal = kept.double()[timesteps.long().cpu()].clamp(min=1e-12)
    return noise_fractions(((1 - signal) / signal).sqrt().tolist(), flow=False)
