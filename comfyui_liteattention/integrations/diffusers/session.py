"""diffusers: LiteAttention on the transformers of one pipeline."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...backends import backend_for
from ...budget.closeness import strength_of
from ...report.statistics import RunReport, status_line
from ...run import Run
from ...settings import Settings, describe
from ...token_order import TokenRanges
from .calls import Place, TransformerCall
from .families import (
    Arguments,
    Family,
    family_of,
    given_tokens,
    self_attention,
    video_tokens,
)
from .hooks import Context, TransformerHook, register_backend, unregister_backend
from .routes import attention_in_use
from .trajectory import Moment, Trajectory, fractions_of, name_stream, noise_levels, sketch

log = logging.getLogger(__name__)

ATTRIBUTE = "_liteattention"
SAFE = "the threshold is at its safest"


class _OfThread(threading.local):
    """The run of a thread, and whether the thread is within a call of a transformer."""

    trajectory: Trajectory | None = None
    calling = False


class Session:
    """LiteAttention on one pipeline, with the state of its current runs.

    ``declined`` says why a transformer stays dense, by its name in the pipeline. Each thread has a
    run of its own, since several pipelines in different threads may share the transformers.
    """

    def __init__(self, target: Any, transformers: dict[str, nn.Module], settings: Settings) -> None:
        self.settings = settings
        self.declined: dict[str, str] = {}
        self.last: RunReport | None = None
        # Weak, so that keeping a report's handle doesn't keep the model in memory.
        self._pipeline = weakref.ref(target)
        self._roots = {name: weakref.ref(root) for name, root in transformers.items()}
        self.attached = False
        self._hooks: list[TransformerHook] = []
        self._mine = _OfThread()
        self._trajectories: weakref.WeakSet[Trajectory] = weakref.WeakSet()
        self._warned: set[str] = set()

    @property
    def idle(self) -> bool:
        """Whether no transformer of the pipeline is supported."""
        return len(self.declined) >= max(len(self._roots), 1)

    def transformers(self) -> dict[str, nn.Module]:
        """The transformers that still exist, by their names in the pipeline."""
        found = {name: root() for name, root in self._roots.items()}
        return {name: root for name, root in found.items() if root is not None}

    def attach(self) -> None:
        """Put all hooks on; if that fails, remove those that were put on."""
        register_backend(self)
        self.attached = True
        try:
            for name, root in self.transformers().items():
                self._hook(name, root)
                setattr(root, ATTRIBUTE, self)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take all hooks off and end all runs; the last report is kept."""
        self.reset()
        for trajectory in list(self._trajectories):
            self._end(trajectory)
        while self._hooks:
            self._hooks.pop().remove()
        for root in self.transformers().values():
            if getattr(root, ATTRIBUTE, None) is self:
                delattr(root, ATTRIBUTE)
        self.attached = False
        unregister_backend(self)

    def replace(self, others: Sequence[Session]) -> None:
        """Attach this session in place of ``others``; if that fails, these stay attached."""
        attached = [other for other in others if other.attached]
        for other in attached:
            other.detach()
        try:
            self.attach()
        except BaseException:
            for other in attached:
                other.attach()
            raise

    def replace_by(self, others: Sequence[Session]) -> None:
        """Attach ``others`` again, and detach everything else from their transformers."""
        roots = [root for session in (self, *others) for root in session.transformers().values()]
        for session in dict.fromkeys(map(session_on, roots)):
            if session is not None and session not in others:
                session.detach()
        self.detach()
        for other in others:
            if not other.attached:
                other.attach()

    def decline(self, reason: str, name: str) -> None:
        """Record that a transformer stays dense, and warn about it."""
        self.declined[name] = reason
        log.warning("LiteAttention: %s stays dense: %s", name, reason)

    def report(self, maps: bool = True) -> RunReport | None:
        """Figures of the current run (this thread's, if it has one), or of the last one. Without
        ``maps`` this is cheap."""
        others = sorted(self._trajectories, key=lambda one: one.started, reverse=True)
        for trajectory in (self._mine.trajectory, *others):
            report = None if trajectory is None else trajectory.report(maps)
            if report is not None:
                return report
        return self.last

    def reset(self) -> None:
        """End this thread's run: its next call of a transformer starts a new one."""
        trajectory, self._mine.trajectory, self._mine.calling = self._mine.trajectory, None, False
        if trajectory is not None:
            self._end(trajectory)

    def _end(self, trajectory: Trajectory) -> None:
        report = None if trajectory.over else trajectory.finish()
        self._trajectories.discard(trajectory)
        if report is not None:
            self.last = report
            self._say(report)

    def _say(self, report: RunReport) -> None:
        """Log what a run did; if it could do nothing at all, as a warning, once."""
        line = status_line(report)
        log.log(logging.INFO if report.calls or line in self._warned else logging.WARNING, line)
        if not report.calls:
            self._warned.add(line)

    def _hook(self, name: str, root: nn.Module) -> None:
        family = family_of(root)
        if isinstance(family, str):
            self.decline(family, name)
            return
        layers = self_attention(root, family)
        if any(layer >= len(layers) for layer in self.settings.dense_layers):
            raise ValueError(
                f"LiteAttention: dense_layers={self.settings.dense_layers!r}: the layers of {name} "
                f"are 0 to {len(layers) - 1}."
            )
        hook: TransformerHook

        def begin(arguments: Arguments, context: Context | None) -> TransformerCall | None:
            return self._begin(name, family, arguments, context, root.config, hook.form())

        hook = TransformerHook(root, layers, family.processors, begin, self.reset)
        self._hooks.append(hook)

    def _begin(
        self,
        name: str,
        family: Family,
        arguments: Arguments,
        context: Context | None,
        config: Any,
        form: Hashable,
    ) -> TransformerCall | None:
        """A call of the transformer ``name`` starts: find its run, or start one."""
        mine = self._mine
        if mine.calling:  # the previous call raised an exception
            self.reset()
        device = arguments["hidden_states"].device
        attention = attention_in_use(self.transformers()[name])
        settings = self.settings
        backend = backend_for(device, settings.mode, attention, settings.criterion)
        if isinstance(backend, str) or not self.settings.skips:
            self._stay_dense(backend if isinstance(backend, str) else SAFE)
            return None
        grid = family.grid(arguments, config)
        now = self._moment(family, arguments, context, form)
        if mine.trajectory is None or not mine.trajectory.continues(name, now):
            self.reset()
            mine.trajectory = Trajectory(now)
            self._trajectories.add(mine.trajectory)
        trajectory = mine.trajectory
        progress, stream = trajectory.advance(name, now)
        if trajectory.over:
            return None
        root, run = self.transformers()[name], trajectory.runs.get(name)
        if run is None:
            settings = _pin(self.settings, given_tokens(family, arguments, config, grid))
            kind = type(root).__name__, attention_in_use(root)
            steps, noise = trajectory.countdown(), trajectory.levels()
            strength = _guidance(self._pipeline(), name)
            run = Run(settings, backend, steps, kind, levels=noise, guidance=strength)
            trajectory.runs[name] = run
        run.begin_call(progress.step)
        mine.calling = True
        prefix = f"{name}." if len(self._roots) > 1 else ""
        cached = getattr(root, "is_cache_enabled", False)
        place = Place(progress, stream, device, prefix, cached)
        video = partial(video_tokens, family, arguments, grid)
        return TransformerCall(run, place, video, self._returned)

    def _returned(self) -> None:
        """A transformer has returned. After a run's last step its state is freed, before the video
        is decoded, which takes much memory."""
        self._mine.calling = False
        trajectory = self._mine.trajectory
        if trajectory is not None and trajectory.complete:
            self._end(trajectory)

    def _stay_dense(self, reason: str) -> None:
        """Report that no call is computed by LiteAttention, and for which reason."""
        self.last = RunReport(describe(self.settings), "none", 0, 0, {}, (), {reason: 1}, ())
        if reason not in self._warned and reason != SAFE:
            log.warning("LiteAttention stays inactive, attention runs as before: %s", reason)
        self._warned.add(reason)

    def _moment(
        self, family: Family, arguments: Arguments, context: Context | None, form: Hashable
    ) -> Moment:
        """What this call tells about its place in the run."""
        stream = context.name if context else name_stream(arguments.get("encoder_hidden_states"))
        step, steps = (context.step_index, context.num_inference_steps) if context else (None, None)
        timestep = torch.as_tensor(family.noise(arguments))
        level = float(timestep.max())
        mean = float(timestep.double().mean()) if timestep.dim() > 1 else level
        scheduler = getattr(self._pipeline(), "scheduler", None)
        levels = noise_levels(scheduler, level, timestep.dtype)
        # The list itself, because a new list means a new run.
        schedule = getattr(scheduler, "timesteps", None) if levels else None
        if family.rising:
            level, mean = family.rising - level, family.rising - mean
            levels = tuple(family.rising - x for x in levels)
        fractions = fractions_of(scheduler) if levels else ()
        latent = sketch(arguments["hidden_states"])
        form = form, _asked(arguments)
        return Moment(stream, step, steps, level, schedule, levels, mean, form, latent, fractions)

    def __reduce__(self) -> Any:
        """None, so that a copy of a pipeline or of a transformer is not enabled."""
        return type(None), ()


def session_on(root: nn.Module) -> Session | None:
    """The session that a transformer is attached to, or None."""
    return getattr(root, ATTRIBUTE, None)


def _asked(arguments: Arguments) -> Hashable:
    """The arguments of a call that are not tensors. Guidance that leaves out blocks or streams
    passes them for one pass and not for another."""
    return tuple(
        (name, value if isinstance(value, (bool, str)) else _numbers(value))
        for name, value in sorted(arguments.items(), key=lambda item: item[0])
        if value is not None and name != "self"
    )


def _numbers(value: object) -> Hashable:
    """A list of whole numbers, such as block numbers; None for anything that may change from step
    to step."""
    if isinstance(value, (list, tuple)) and all(isinstance(x, int) for x in value):
        return tuple(value)
    return None


def _guidance(pipeline: Any, transformer: str) -> float:
    """The strength of guidance in the call that a pipeline is in, for the transformer of that name.
    Where it is an input of the model, or a guider's matter, it is taken for what closeness was
    calibrated with."""
    guided = getattr(pipeline, "do_classifier_free_guidance", None)
    if guided is False:
        return 1.0
    if not guided:
        return strength_of(None)
    second = getattr(pipeline, "_guidance_scale_2", None)
    if transformer == "transformer_2" and second is not None:
        return strength_of(second)
    return strength_of(getattr(pipeline, "guidance_scale", None))


def _pin(settings: Settings, tokens: TokenRanges) -> Settings:
    """The settings, with these tokens never skipped."""
    return replace(
        settings,
        dense_keys=settings.dense_keys + tokens,
        dense_queries=settings.dense_queries + tokens,
    )
