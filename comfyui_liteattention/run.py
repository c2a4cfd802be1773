"""One sampling run and all its skip state, which is dropped when the run ends."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from .attention import LayerState, Part, States, Stream, Tally, all_tiles, attend, split
from .backends.base import Backend, Inputs, Provider
from .backends.clock import stopwatch
from .backends.kernel_selftest import lacks_memory
from .budget.closeness import GUIDANCE
from .never_slower.dense import Dense
from .never_slower.pace import Pace, Timed
from .never_slower.rehearsal import decided
from .plan import Plan
from .policy import first_marking_step
from .report.outcome import Outcome, Seen, extremes, look
from .report.record import Record
from .report.statistics import RunReport, in_short
from .schedule import Progress, assumed_levels, locate
from .settings import Settings
from .token_order import VideoTokens

log = logging.getLogger(__name__)

NOT_FINITE = "the result was not finite (NaN or infinity): this layer stays dense for the run"
NOT_FINITE_AGAIN = "results were not finite (NaN or infinity) again: switched off for this run"

DENSE_LAYER = "a layer of dense_layers: it stays dense, as asked"
TIMED = "the first calls of a run are left to your own attention, which is timed"
WAITING = "waiting: your own attention is still faster"
OUT_OF_MEMORY = "not enough memory for LiteAttention on this device: switched off for this run"


class Run:
    """State and statistics of one run. Safe to call from several threads, as long as each call of a
    model, from :meth:`begin_call` to :meth:`end_call`, stays in one thread.

    Streams (cond, uncond, a context window, a device, ...) and layers never share state: it is
    keyed by (layer, stream, shape of the queries). ``kind`` identifies the model and the user's own
    attention; whether skipping pays is decided once per process for each kind. ``lasting``: a
    context in which our calls allocate what outlives them (integrations/comfy/compiler.py).
    ``levels``: ``sigmas`` as noise fractions (schedule.noise_fractions), where they are known.
    ``guidance``: its strength, 1 without, where it is known.
    """

    def __init__(
        self,
        settings: Settings,
        backend: Provider,
        sigmas: Sequence[float],
        kind: Hashable = (),
        lasting: Callable[[], AbstractContextManager[object]] = nullcontext,
        levels: Sequence[float] = (),
        guidance: float = GUIDANCE,
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.sigmas = tuple(sigmas)
        self.steps = max(len(self.sigmas) - 1, 0)
        self._kind = kind
        self._lasting = lasting
        self._backends: dict[tuple[torch.device, int, torch.dtype], Backend | str] = {}
        self._states = States()
        self._failed: set[str] = set()
        self._stopped: str | None = None
        first = first_marking_step(settings, self.steps)
        self._paces = defaultdict[torch.device, Pace](partial(Pace, self.steps, first))
        self._open: defaultdict[int, list[Outcome]] = defaultdict(list)  # by thread
        known = tuple(levels) or assumed_levels(self.steps)
        self._plan = Plan(settings, known, self.steps > 0, guidance)
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
            self._open.pop(threading.get_ident(), None)  # left by a call that raised
            self._record.begin_step(step, self._states.named())

    def end_call(self, step: int, seconds: float) -> bool:
        """The call of the model that began in this thread has returned, after ``seconds``.

        False: one of our results in it was not finite. The model's result must not be passed on;
        call the model again: the layer at fault now stays dense.
        """
        with self._lock:
            self._record.time_step(step, seconds)
        return self.sound()

    def sound(self) -> bool:
        """Whether all our results in this thread since the last time it was asked are finite; waits
        for the device. Asked after every layer of a model whose calls can't be repeated."""
        with self._lock:
            outcomes = self._open.pop(threading.get_ident(), [])
        try:
            return self._note(look(outcomes))
        except RuntimeError as error:
            self._lacking(error)
            return False  # unknown counts as not finite

    def attend(
        self,
        layer: str,
        streams: Sequence[Stream],
        progress: Progress,
        call: Inputs,
        video: VideoTokens | None = None,
        dense: Dense | None = None,
    ) -> Tensor | None:
        """:meth:`attend_parts` for a batch ``[B, H, L, D]`` of ``len(streams)`` equal parts."""
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
        dense: Dense | None = None,
    ) -> list[Tensor] | None:
        """Attention of one layer, for each of the parts ``[B, H, L, D]``.

        None: the caller has to do this call densely; the reason is counted. ``dense`` is that call,
        which is timed where its time is worth knowing; without it nothing is timed, and all calls
        are ours. Nothing waits for the device (except once per process, to decide which is faster):
        :meth:`end_call` says whether the result was finite.
        """
        if self._stopped or layer in self._failed:
            self.decline(self._stopped or NOT_FINITE)
            return None
        q = parts[0].inputs.q
        kind = q.device, q.shape[3], q.dtype
        backend = self._backends.get(kind) or self._provide(*kind)
        if isinstance(backend, str):
            self.decline(backend)
            return None
        with self._lock:
            number, states = self._states.of(layer, parts)
        if number in self.settings.dense_layers:
            self.decline(DENSE_LAYER)
            return None
        try:
            asks = dense if self.settings.never_slower else None
            if asks and not self._takes_part(layer, progress, parts, backend, asks):
                return None
            stop, position, aim = stopwatch(q.device), progress.position, self._plan.aim(progress)
            with self._lasting():
                done = [
                    attend(state, backend, call, self.settings, position, video, aim)
                    for state, (_, call, video) in zip(states, parts, strict=True)
                ]
                ends = [end for out, _ in done for end in extremes(out)]
        except RuntimeError as error:
            self._lacking(error)
            return None
        streams = tuple(part.stream for part in parts)
        tokens = tuple(part.inputs.q.shape[2] for part in parts)
        tallies = tuple(tally for _, tally in done)
        self._leave(Outcome(progress, layer, streams, tokens, tallies, stop(), tuple(ends)))
        return [out for out, _ in done]

    def report(self, maps: bool = True) -> RunReport:
        """What the run has done, up to the last call of the model that has returned. Without
        ``maps`` this is cheap and does not wait for the device."""
        with self._lock:
            notes = dict.fromkeys(pace.note for pace in self._paces.values() if pace.note)
            states = self._states.named() if maps else None
            return self._record.report(self.backend.name, states, self._stopped, [*notes])

    def progress_text(self, step: int) -> str:
        """One line about the step that just ended, for people who are waiting."""
        with self._lock:
            if self._stopped is not None:
                return f"switched off: {in_short(self._stopped)}"
            return self._record.text(step)

    def finish(self) -> RunReport:
        """End the run: drop all state and return its report. Never raises: a failed report must not
        cost anyone a finished video."""
        with self._lock:  # left by a call of the model that raised
            outcomes = [outcome for calls in self._open.values() for outcome in calls]
        try:
            self._note(look(outcomes))
            return self.report()
        except Exception as error:  # whatever a device or a driver throws by then
            log.warning("LiteAttention: no report of this run: %s", error)
            return self._record.remnant(self.backend.name, error)
        finally:
            with self._lock:
                self._states.forget()
                self._open.clear()
                self._record.clear()

    def _takes_part(
        self,
        layer: str,
        progress: Progress,
        parts: Sequence[Part],
        backend: Backend,
        dense: Dense,
    ) -> bool:
        """Whether LiteAttention computes a call; if not, ``dense``, which will, is to be timed."""
        device = parts[0].inputs.q.device
        streams = tuple(part.stream for part in parts)
        tokens = tuple(part.inputs.q.shape[2] for part in parts)
        tallies = tuple(all_tiles(part, backend) for part in parts)
        tiles = sum(tally.total for tally in tallies)
        with self._lock:
            pace = self._paces[device]
        if pace.due:
            self._decide(pace, parts[0], backend)
        if pace.reason is not None:
            self._stop(pace.reason)
            return False
        with self._lock:
            if pace.takes_part((layer, streams), progress.step, tiles):
                return True
        self.decline(TIMED if pace.times else WAITING)

        def tell(seconds: Callable[[], float]) -> None:  # holds none of the tensors
            self._leave(Outcome(progress, layer, streams, tokens, tallies, seconds))
            if pace.times:
                pace.timed.append(Timed(progress.step, tiles, seconds))

        dense.time(device, tell)
        return False

    def _decide(self, pace: Pace, part: Part, backend: Backend) -> None:
        """Decide whether this run skips, and from which step on. The only place that waits for the
        device while a model runs: once per process for each kind of call."""

        def ask(state: LayerState, position: float) -> Tally:
            aim = self._plan.aim(Progress(int(position * max(self.steps - 1, 0)), position))
            with self._lasting():
                call, video = part.inputs, part.video
                return attend(state, backend, call, self.settings, position, video, aim)[1]

        q, tiles = part.inputs.q, all_tiles(part, backend).total
        kind = self._kind, self.settings, self.backend.name, q.device, q.dtype, q.shape
        pace.decide(decided(kind, ask, pace.timed, tiles, q.device))

    def _leave(self, outcome: Outcome) -> None:
        """Keep a call's figures on the device until the model has returned."""
        with self._lock:
            self._open[threading.get_ident()].append(outcome)

    def _note(self, calls: Sequence[Seen]) -> bool:
        """Record the attention calls of one call of the model; True if all results were finite."""
        broken = next((seen.outcome.layer for seen in calls if not seen.finite), None)
        if broken is not None:
            self._fail(broken)
            return False
        reason = None
        with self._lock:
            for outcome, _, stats in calls:
                self._record.add(stats)
                pace = self._paces.get(outcome.extremes[0].device) if outcome.extremes else None
                if pace is not None:
                    computed = sum(call.computed for call in stats)
                    pace.settle((outcome.layer, outcome.streams), outcome.tiles, computed)
                    reason = reason or pace.reason
        if reason is not None and self._stopped is None:
            self._stop(reason)
        return True

    def _stop(self, reason: str) -> None:
        """Stay dense to the end of the run, and free the skip state."""
        with self._lock:
            self._stopped = reason
            self._states.forget()
        self.decline(reason)

    def _lacking(self, error: RuntimeError) -> None:
        """Stay dense after an out-of-memory error; raise any other."""
        if not lacks_memory(error):
            raise error
        self._stop(OUT_OF_MEMORY)

    def _fail(self, layer: str) -> None:
        """Leave the layer to the user's own attention. Later layers got its broken output as input,
        so all layers start over. If it happens again, the fault isn't one layer's: stop the run."""
        if self._failed:
            self._stop(NOT_FINITE_AGAIN)
            return
        with self._lock:
            self._failed.add(layer)
            self._states.forget()
        self.decline(NOT_FINITE)

    def _provide(self, device: torch.device, head_dim: int, dtype: torch.dtype) -> Backend | str:
        """The backend for such calls, or why there is none; remembered for the run."""
        found = self.backend.provide(device, head_dim, dtype)
        return self._backends.setdefault((device, head_dim, dtype), found)
