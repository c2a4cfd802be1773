"""One sampling run: all skip state, born with the run and gone with it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import LayerState, Tally, attend
from .backends.base import Backend, Inputs, Provider
from .backends.kernel_selftest import lacks_memory
from .budget.ledger import allowance
from .never_slower import Pace, stopwatch
from .policy import marks
from .report.map_history import MapHistory
from .report.statistics import CallStats, MapStats, RunReport, fraction, in_short, mean_lost, saving
from .schedule import Progress, locate
from .settings import Settings, describe
from .tiles import unpack
from .token_order import VideoTokens

log = logging.getLogger(__name__)

Stream = Hashable
NOT_FINITE = "the result was not finite (NaN or infinity): this layer stays dense for the run"

DENSE_LAYER = "a layer of dense_layers: it stays dense, as asked"
WAITING = "your own attention is timed at first, and used until LiteAttention is faster"
OUT_OF_MEMORY = "not enough memory for LiteAttention on this device: switched off for this run"


class _Call(NamedTuple):
    step: int
    position: float
    layer: str
    stream: Stream
    tokens: int
    tally: Tally
    seconds: float
    waits: bool = False


class _Key(NamedTuple):
    layer: str
    stream: Stream
    heads: int
    length: int
    head_dim: int


class Run:
    """State and statistics of one run. Safe to call from several threads.

    Streams (cond, uncond, a context window, a device, ...) and layers never share state: it is
    keyed by (layer, stream, shape of the queries).
    """

    def __init__(self, settings: Settings, backend: Provider, sigmas: Sequence[float]) -> None:
        self.settings = settings
        self.backend = backend
        self.sigmas = tuple(sigmas)
        self.reasons: Counter[str] = Counter()
        self._backends: dict[tuple[torch.device, int, torch.dtype], Backend | str] = {}
        self._states: dict[_Key, LayerState] = {}
        self._stocks: defaultdict[Hashable, dict[str, Tensor]] = defaultdict(dict)
        self._failed: set[str] = set()
        self._stopped: str | None = None
        self._calls: list[_Call] = []
        self._layers: dict[str, int] = {}
        self._seconds: defaultdict[int, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._pace = Pace(len(self.sigmas) - 1, self._first_step())
        self._history = MapHistory()
        self._step = 0
        self._started = time.perf_counter()

    def locate(self, sigma: float) -> Progress:
        return locate(sigma, self.sigmas)

    def decline(self, reason: str) -> bool:
        """Count a call that stays dense; True the first time this reason is seen in the run."""
        with self._lock:
            self.reasons[reason] += 1
            return self.reasons[reason] == 1

    def time_step(self, step: int, seconds: float) -> None:
        """Add the wall time of one model call to its step."""
        with self._lock:
            self._seconds[step] += seconds

    def attend(
        self,
        layer: str,
        streams: Sequence[Stream],
        progress: Progress,
        call: Inputs,
        video: VideoTokens | None = None,
        dense: Callable[[], Tensor] | None = None,
    ) -> Tensor | None:
        """Attention of one layer, ``[B, H, L, D]``; its batch holds ``len(streams)`` equal parts.

        ``video`` says which of the ``L`` tokens are video; None: all of them, on an unknown grid.
        ``dense`` does the same call with the user's own attention, once, and remembers what came
        out. It is asked here where the time that it takes is worth knowing. None: the caller has to
        do this call densely; the reason is counted.
        """
        if self._stopped or layer in self._failed:
            self.decline(self._stopped or NOT_FINITE)
            return None
        q = call.q
        backend = self._provide(q)
        if isinstance(backend, str):
            self.decline(backend)
            return None
        index = self._enter(layer)
        if index in self.settings.dense_layers:
            self.decline(DENSE_LAYER)
            return None
        if self._watch(progress.step):
            return None

        if dense is not None and self.settings.never_slower:
            with self._lock:
                ours = self._pace.takes_part(index, progress.step)
            if not ours:
                self._wait(progress, layer, streams, call, dense)
                return None

        seconds = stopwatch(q.device)
        try:
            parts = [
                attend(
                    self._state(layer, stream, qs),
                    backend,
                    Inputs(qs, ks, vs, call.scale),
                    self.settings,
                    progress.position,
                    video,
                )
                for stream, qs, ks, vs in zip(
                    streams, *(t.chunk(len(streams)) for t in call[:3]), strict=True
                )
            ]
            out = parts[0][0] if len(parts) == 1 else torch.cat([part for part, _ in parts])
            finite = _finite(out)
            self._count(progress, layer, streams, q.shape[2], [t for _, t in parts], seconds())
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            self._stop(OUT_OF_MEMORY)
            return None
        if not finite:
            self._fail(layer)
            return None
        return out

    def _count(
        self,
        progress: Progress,
        layer: str,
        streams: Sequence[Stream],
        tokens: int,
        tallies: Sequence[Tally],
        seconds: float,
    ) -> None:
        """Note a call that took so long; each stream is an equal part of it."""
        share = seconds / len(streams)
        with self._lock:
            for stream, tally in zip(streams, tallies, strict=True):
                self._calls.append(_Call(*progress, layer, stream, tokens, tally, share))
            self._pace.count(progress.step, seconds, tallies)

    def _wait(
        self,
        progress: Progress,
        layer: str,
        streams: Sequence[Stream],
        call: Inputs,
        dense: Callable[[], Tensor],
    ) -> None:
        """Note a call that the user's own attention does, and how long that takes."""
        q, k = call.q, call.k
        seconds = stopwatch(q.device)
        dense()
        share = seconds() / len(streams)
        tq, tk = self.backend.tile_shape(q.shape[3]).grid(q.shape[2], k.shape[2])
        tiles = q.shape[0] // len(streams) * q.shape[1] * tq * tk
        tally = Tally(torch.tensor(tiles, device="cpu"), tiles, None)
        self.decline(WAITING)
        with self._lock:
            for stream in streams:
                self._calls.append(_Call(*progress, layer, stream, q.shape[2], tally, share, True))
            self._pace.compare(progress.step, share * len(streams), tiles * len(streams))

    def _watch(self, step: int) -> bool:
        """Whether the run goes on densely because that is faster; looks once a step."""
        with self._lock:
            if step > self._step:
                self._pace.end_step(self._step)
                self._history.note(step, self._by_layer())
            self._step = max(step, self._step)
            reason = self._pace.reason
        if reason is not None:
            self._stop(reason)
        return reason is not None

    def _by_layer(self) -> list[tuple[str, LayerState]]:
        """All states, the layers in the order of execution."""
        states = [(key.layer, state) for key, state in self._states.items()]
        return sorted(states, key=lambda one: self._layers[one[0]])

    def _stop(self, reason: str) -> None:
        """Go on densely to the end of the run; the skip state is of no more use."""
        with self._lock:
            self._stopped = reason
            self._forget()
        self.decline(reason)

    def _fail(self, layer: str) -> None:
        """Leave the layer to the user's own attention. What it lost or could lose is not a number
        any more, and must not be counted with that of the others."""
        with self._lock:
            self._failed.add(layer)
            for key in [key for key in self._states if key.layer == layer]:
                self._states.pop(key).stocks.pop(layer, None)
        self.decline(NOT_FINITE)

    def report(self) -> RunReport:
        """What the run has done so far."""
        with self._lock:
            return RunReport(
                settings=describe(self.settings),
                backend=self.backend.name,
                steps=max(len(self.sigmas) - 1, 0),
                seconds=time.perf_counter() - self._started,
                step_seconds=dict(self._seconds),
                calls=tuple(_resolve(call) for call in self._calls),
                reasons=dict(self.reasons),
                maps=tuple(self._maps()),
                history=self._history.maps(),
                allowed=self._allowed(),
                stopped=self._stopped,
                dense_rate=self._pace.dense_rate,
            )

    def progress_text(self, step: int) -> str:
        """One line about the step that just ended, for people who are waiting."""
        with self._lock:
            calls = [_resolve(call) for call in self._calls if call.step == step]
            if self._stopped is not None:
                return f"inactive: {in_short(self._stopped)}"
            if not calls:
                return f"inactive: {next(iter(self.reasons), 'nothing to skip yet')}"
            saved = self._pace.saved
        lost = mean_lost(calls)
        return (
            f"step {step + 1}/{max(len(self.sigmas) - 1, 1)}: "
            f"{1 - fraction(calls):.0%} skipped"
            + ("" if lost is None else f", {lost:.2%} lost")
            + ("" if saved is None else f", {saving(saved)}")
        )

    def finish(self) -> RunReport:
        """End the run: drop all state and return what is worth keeping."""
        report = self.report()
        with self._lock:
            self._forget()
            self._calls.clear()
        return report

    def _forget(self) -> None:
        """Drop all skip state; the lock is held."""
        self._states.clear()
        self._stocks.clear()

    def _state(self, layer: str, stream: Stream, q: Tensor) -> LayerState:
        with self._lock:
            key = _Key(layer, stream, *q.shape[1:])
            stocks = self._stocks[key._replace(layer=""), q.device]
            return self._states.setdefault(key, LayerState(name=layer, stocks=stocks))

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

    def _allowed(self) -> tuple[float, ...]:
        """Lost mass that the budget allows in the middle of each step."""
        if self.settings.budget is None:
            return ()
        steps = len(self.sigmas) - 1
        budget, ramp = self.settings.budget, self.settings.ramp
        return tuple(allowance(budget, ramp, (step + 0.5) / steps) for step in range(steps))

    def _first_step(self) -> int:
        """The first step whose calls can mark tiles."""
        steps = len(self.sigmas) - 1
        return sum(not marks(self.settings, (step + 1) / steps) for step in range(steps))

    def _maps(self):
        """Final tile maps, one per layer and stream, heads and batch averaged."""
        for key, state in self._states.items():
            if state.live is None or state.pinned is None:
                continue
            live = unpack(state.live, state.pinned.shape[1]).float().mean((0, 1)).cpu()
            yield MapStats(key.layer, str(key.stream), key.length, live)


def _finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite: either would be the smallest or the largest. In one pass
    and without a copy, unlike ``torch.isfinite(x).all()``."""
    return all(math.isfinite(value) for value in torch.stack(torch.aminmax(x)).tolist())


def _resolve(call: _Call) -> CallStats:
    computed, total, lost, bound = call.tally
    return CallStats(
        step=call.step,
        layer=call.layer,
        stream=str(call.stream),
        tokens=call.tokens,
        computed=int(computed),
        total=total,
        lost=None if lost is None else float(lost),
        bound=None if bound is None else float(bound),
        seconds=call.seconds,
        waits=call.waits,
    )
