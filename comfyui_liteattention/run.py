"""One sampling run: all skip state, born with the run and gone with it."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import LayerState, Tally, attend
from .backends.base import Backend, Inputs, Provider
from .backends.clock import stopwatch
from .backends.kernel_selftest import lacks_memory
from .never_slower.costs import Costs
from .never_slower.pace import Pace, Timed
from .never_slower.rehearsal import decided, rehearse
from .plan import Plan
from .policy import marks
from .report.outcome import Outcome, Seen, extremes, look
from .report.record import Named, Record
from .report.statistics import RunReport, in_short
from .schedule import Progress, assumed_levels, locate
from .settings import Settings
from .token_order import VideoTokens

log = logging.getLogger(__name__)

Stream = Hashable
NOT_FINITE = "the result was not finite (NaN or infinity): this layer stays dense for the run"
NOT_FINITE_AGAIN = "results were not finite (NaN or infinity) again: switched off for this run"

DENSE_LAYER = "a layer of dense_layers: it stays dense, as asked"
TIMED = "the first calls of a run are left to your own attention, which is timed"
WAITING = "waiting: your own attention is still faster"
OUT_OF_MEMORY = "not enough memory for LiteAttention on this device: switched off for this run"


class Part(NamedTuple):
    """What an attention call asks for one stream. ``video`` says which of the tokens are video;
    None: all of them, on an unknown grid."""

    stream: Stream
    inputs: Inputs
    video: VideoTokens | None = None


def split(streams: Sequence[Stream], call: Inputs, video: VideoTokens | None) -> list[Part]:
    """The equal parts of a batch, of a stream each."""
    tensors = (t.chunk(len(streams)) for t in call[:3])
    return [
        Part(stream, call._replace(q=q, k=k, v=v), video)
        for stream, q, k, v in zip(streams, *tensors, strict=True)
    ]


class _Key(NamedTuple):
    layer: str
    stream: Stream
    batch: int
    heads: int
    length: int
    head_dim: int


class Run:
    """State and statistics of one run. Safe to call from several threads; one call of a model, from
    :meth:`begin_call` to :meth:`end_call`, stays in one.

    Streams (cond, uncond, a context window, a device, ...) and layers never share state: it is
    keyed by (layer, stream, shape of the queries). ``kind`` names the model and the attention that
    the user has beside ours: what is decided once in a process is decided for that. ``lasting``: a
    context in which our calls allocate what they need (see integrations/comfy/compiler.py).
    ``levels``: ``sigmas`` as parts of the latent (schedule.noise_fractions), where they are known.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Provider,
        sigmas: Sequence[float],
        kind: Hashable = (),
        lasting: Callable[[], AbstractContextManager[object]] = nullcontext,
        levels: Sequence[float] = (),
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.sigmas = tuple(sigmas)
        self.steps = max(len(self.sigmas) - 1, 0)
        self._kind = kind
        self._lasting = lasting
        self._backends: dict[tuple[torch.device, int, torch.dtype], Backend | str] = {}
        self._states: dict[_Key, LayerState] = {}
        self._remaining: defaultdict[Hashable, dict[str, Tensor]] = defaultdict(dict)
        self._failed: set[str] = set()
        self._stopped: str | None = None
        self._layers: dict[str, int] = {}
        self._paces: dict[torch.device, Pace] = {}
        self._open: defaultdict[int, list[Outcome]] = defaultdict(list)  # by thread
        self._plan = Plan(settings, tuple(levels) or assumed_levels(self.steps), self.steps > 0)
        self._record = Record(self._plan, self.steps)
        self._lock = threading.Lock()

    def locate(self, sigma: float) -> Progress:
        return locate(sigma, self.sigmas)

    def decline(self, reason: str) -> bool:
        """Count a call that stays dense; True the first time this reason is seen in the run."""
        with self._lock:
            return self._record.decline(reason)

    def begin_call(self, step: int) -> None:
        """A call of the model begins, at this step."""
        with self._lock:
            self._open.pop(threading.get_ident(), None)  # of a call that ended in an exception
            self._record.begin_step(step, self._named())

    def end_call(self, step: int, seconds: float) -> bool:
        """The call of the model that began in this thread has returned after so long.

        False: its result was made from one of ours that is not finite. It must not be passed on,
        and the model has to be called again without us; we are out of the way where it came from.
        """
        with self._lock:
            self._record.time_step(step, seconds)
        return self.sound()

    def sound(self) -> bool:
        """Whether the results since this was last asked in this thread are finite; waits for the
        device. For models whose calls can't be repeated: the layer is done densely at once."""
        with self._lock:
            outcomes = self._open.pop(threading.get_ident(), [])
        try:
            return self._note(look(outcomes))
        except RuntimeError as error:
            self._lacking(error)
            return False  # nobody knows

    def attend(
        self,
        layer: str,
        streams: Sequence[Stream],
        progress: Progress,
        call: Inputs,
        video: VideoTokens | None = None,
        dense: Callable[[], Tensor] | None = None,
    ) -> Tensor | None:
        """:meth:`attend_parts` of a batch that holds ``len(streams)`` equal parts,
        ``[B, H, L, D]``."""
        outs = self.attend_parts(layer, progress, split(streams, call, video), dense)
        if outs is None or len(outs) == 1:
            return None if outs is None else outs[0]
        try:
            return torch.cat(outs)
        except RuntimeError as error:
            self._lacking(error)
            return None

    def attend_parts(
        self,
        layer: str,
        progress: Progress,
        parts: Sequence[Part],
        dense: Callable[[], Tensor] | None = None,
    ) -> list[Tensor] | None:
        """Attention of one layer, for each of the parts ``[B, H, L, D]``.

        ``dense`` does the same call with the user's own attention, once, and remembers what came
        out. It is asked here where the time that it takes is worth knowing. None: the caller has to
        do this call densely; the reason is counted. Nothing waits for the device (but once in a
        process, to decide what is faster): whether the result is finite, :meth:`end_call` says.
        """
        if self._stopped or layer in self._failed:
            self.decline(self._stopped or NOT_FINITE)
            return None
        backend = self._provide(parts[0].inputs.q)
        if isinstance(backend, str):
            self.decline(backend)
            return None
        if self._enter(layer) in self.settings.dense_layers:
            self.decline(DENSE_LAYER)
            return None
        try:
            timed = dense if self.settings.never_slower else None
            if timed and not self._takes_part(layer, progress, parts, backend, timed):
                return None
            stop = stopwatch(parts[0].inputs.q.device)
            with self._lasting():
                done = [
                    self._attend(self._state(layer, part), backend, part, progress)
                    for part in parts
                ]
                ends = [end for out, _ in done for end in extremes(out)]
        except RuntimeError as error:
            self._lacking(error)
            return None
        self._leave(layer, progress, parts, [tally for _, tally in done], stop(), ends)
        return [out for out, _ in done]

    def report(self) -> RunReport:
        """What the run has done so far."""
        with self._lock:
            open_calls = [outcome for calls in self._open.values() for outcome in calls]
            self._open.clear()
        self._note(look(open_calls))
        with self._lock:
            notes = dict.fromkeys(pace.note for pace in self._paces.values() if pace.note)
            return self._record.report(self.backend.name, self._named(), self._stopped, [*notes])

    def progress_text(self, step: int) -> str:
        """One line about the step that just ended, for people who are waiting."""
        with self._lock:
            if self._stopped is not None:
                return f"switched off: {in_short(self._stopped)}"
            return self._record.text(step)

    def finish(self) -> RunReport:
        """End the run: drop all state and return what is worth keeping. Never fails: a report must
        not cost anyone a finished video."""
        try:
            return self.report()
        except Exception as error:  # whatever a device or a driver throws by then
            log.warning("LiteAttention: no report of this run: %s", error)
            return self._record.remnant(self.backend.name, error)
        finally:
            with self._lock:
                self._forget()
                self._open.clear()
                self._record.clear()

    def _attend(
        self, state: LayerState, backend: Backend, part: Part, progress: Progress
    ) -> tuple[Tensor, Tally]:
        aim = self._plan.aim(progress)
        position = progress.position
        return attend(state, backend, part.inputs, self.settings, position, part.video, aim)

    def _takes_part(
        self,
        layer: str,
        progress: Progress,
        parts: Sequence[Part],
        backend: Backend,
        dense: Callable[[], Tensor],
    ) -> bool:
        """Whether a call is ours; if not, the user's own attention does it here and now."""
        device = parts[0].inputs.q.device
        with self._lock:
            pace = self._paces.setdefault(device, Pace(self.steps, self._first_step()))
        tallies = [_all_tiles(part, backend) for part in parts]
        tiles = sum(tally.total for tally in tallies)
        if not pace.times:
            with self._lock:
                ours = pace.takes_part(_who(layer, parts), progress.step, tiles)
            if ours:
                return True
            self.decline(WAITING)
        else:
            self.decline(TIMED)
        stop = stopwatch(device)
        dense()
        seconds = stop()
        self._leave(layer, progress, parts, tallies, seconds)
        if pace.times:
            pace.timed.append(Timed(progress.step, tiles, seconds))
            if not pace.times:
                self._decide(pace, parts[0], backend)
        return False

    def _decide(self, pace: Pace, part: Part, backend: Backend) -> None:
        """Whether this run skips, and from which step on. The only place that waits for the device
        while a model runs, once in a process for each kind of call."""
        q = part.inputs.q
        tiles = _all_tiles(part, backend).total

        def ask(state: LayerState, position: float) -> Tally:
            with self._lasting():
                at = Progress(int(position * max(self.steps - 1, 0)), position)
                return self._attend(state, backend, part, at)[1]

        def measure() -> Costs:
            dense = min(call.seconds() / call.tiles for call in reversed(pace.timed)) * tiles
            return rehearse(ask, q.device).costs(dense)

        kind = (self._kind, self.settings, self.backend.name, q.device, q.dtype, q.shape)
        pace.decide(decided(kind, measure))
        if pace.reason is not None:
            self._stop(pace.reason)

    def _leave(
        self,
        layer: str,
        progress: Progress,
        parts: Sequence[Part],
        tallies: Sequence[Tally],
        seconds: Callable[[], float],
        ends: Sequence[Tensor] = (),
    ) -> None:
        """Leave what a call came to on the device until the model has returned."""
        streams = tuple(part.stream for part in parts)
        tokens = tuple(part.inputs.q.shape[2] for part in parts)
        outcome = Outcome(progress, layer, streams, tokens, tuple(tallies), seconds, tuple(ends))
        with self._lock:
            self._open[threading.get_ident()].append(outcome)

    def _note(self, calls: Sequence[Seen]) -> bool:
        """Take down what the calls of a model came to; whether all results were finite."""
        broken = next((seen.outcome.layer for seen in calls if not seen.finite), None)
        if broken is not None:
            self._fail(broken)
            return False
        reason = None
        with self._lock:
            for outcome, _, stats in calls:
                self._record.add(stats)
                device = outcome.extremes[0].device if outcome.extremes else None
                if device in self._paces:
                    pace = self._paces[device]
                    computed = sum(call.computed for call in stats)
                    pace.settle((outcome.layer, outcome.streams), outcome.tiles, computed)
                    reason = reason or pace.reason
        if reason is not None and self._stopped is None:
            self._stop(reason)
        return True

    def _stop(self, reason: str) -> None:
        """Go on densely to the end of the run; the skip state is of no more use."""
        with self._lock:
            self._stopped = reason
            self._forget()
        self.decline(reason)

    def _lacking(self, error: RuntimeError) -> None:
        """Go on densely if it was memory that was lacking; all else is no reason to go on."""
        if not lacks_memory(error):
            raise error
        self._stop(OUT_OF_MEMORY)

    def _fail(self, layer: str) -> None:
        """Leave the layer to the user's own attention. The layers behind it were given what it had
        computed, so that all begin again; where that doesn't help, it isn't one layer's fault."""
        if self._failed:
            self._stop(NOT_FINITE_AGAIN)
            return
        with self._lock:
            self._failed.add(layer)
            self._forget()
        self.decline(NOT_FINITE)

    def _state(self, layer: str, part: Part) -> LayerState:
        with self._lock:
            key = _Key(layer, part.stream, *part.inputs.q.shape)
            remaining = self._remaining[key._replace(layer=""), part.inputs.q.device]
            return self._states.setdefault(key, LayerState(name=layer, remaining=remaining))

    def _named(self) -> list[Named]:
        """All states, the layers in the order of execution; the lock is held."""
        found = [Named(k.layer, str(k.stream), k.length, s) for k, s in self._states.items()]
        return sorted(found, key=lambda one: self._layers[one.layer])

    def _forget(self) -> None:
        """Drop all skip state; the lock is held."""
        self._states.clear()
        self._remaining.clear()

    def _provide(self, q: Tensor) -> Backend | str:
        """The backend for calls like this one, or why there is none: asked once for each kind."""
        kind = (q.device, q.shape[3], q.dtype)
        if kind not in self._backends:
            self._backends[kind] = self.backend.provide(*kind)
        return self._backends[kind]

    def _enter(self, layer: str) -> int:
        """Number of a layer, in the order of execution."""
        with self._lock:
            return self._layers.setdefault(layer, len(self._layers))

    def _first_step(self) -> int:
        """The first step whose calls can mark tiles."""
        done = ((step + 1) / self.steps for step in range(self.steps))
        return sum(not marks(self.settings, position) for position in done)


def _who(layer: str, parts: Sequence[Part]) -> Hashable:
    """Whose calls go on from one step to the next."""
    return layer, tuple(part.stream for part in parts)


def _all_tiles(part: Part, backend: Backend) -> Tally:
    """Of a call that computes everything."""
    q, k = part.inputs.q, part.inputs.k
    tq, tk = backend.tile_shape(q.shape[3]).grid(q.shape[2], k.shape[2])
    tiles = q.shape[0] * q.shape[1] * tq * tk
    return Tally(tiles, tiles, None)
