"""diffusers: LiteAttention on the transformers of one pipeline."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ...backends import backend_for
from ...report.statistics import RunReport, status_line, text_table
from ...run import Run
from ...settings import Settings, describe
from ...token_order import TokenRanges
from .calls import Place, TransformerCall
from .families import (
    RISING_END,
    Arguments,
    Family,
    family_of,
    given_tokens,
    self_attention,
    video_tokens,
)
from .hooks import TransformerHook, register_backend, unregister_backend
from .trajectory import Moment, Trajectory, name_stream, noise_levels

log = logging.getLogger(__name__)

ATTRIBUTE = "_liteattention"


class Session:
    """LiteAttention on one pipeline, with the state of the run that is going on.

    ``declined`` says why a transformer stays dense, by its name in the pipeline.
    """

    def __init__(self, target: Any, transformers: dict[str, nn.Module], settings: Settings) -> None:
        self.settings = settings
        self.declined: dict[str, str] = {}
        self._pipeline = weakref.ref(target)
        self._transformers = transformers
        self._hooks: list[TransformerHook] = []
        self._trajectory: Trajectory | None = None
        self._calling = False
        self._last: RunReport | None = None
        # Also where the pipeline is dropped without disabling; added before the set's own note.
        weakref.finalize(self, _unregister_unused).atexit = False
        _enabled.add(self)
        register_backend()
        for name, root in transformers.items():
            setattr(root, ATTRIBUTE, self)
            self._hook(name, root)

    def report(self) -> RunReport | None:
        """Figures of the run that is going on, or of the last one; None before the first."""
        current = None if self._trajectory is None else self._trajectory.report()
        return current or self._last

    def summary(self) -> str:
        """The report as text, and why transformers stay dense."""
        lines = [f"{name} stays dense: {reason}" for name, reason in self.declined.items()]
        report = self.report()
        if report is not None:
            lines.insert(0, text_table(report))
        elif self._hooks:
            lines.insert(0, f"LiteAttention enabled, no run yet; {describe(self.settings)}")
        return "\n".join(lines)

    def reset(self) -> None:
        """End the run: the next call of a transformer starts a new one. Pipelines do it alone."""
        trajectory, self._trajectory, self._calling = self._trajectory, None, False
        report = None if trajectory is None else trajectory.finish()
        if report is not None:
            self._last = report
            log.info(status_line(report))

    def disable(self) -> None:
        """Take all hooks off; the last report stays with this object."""
        self.reset()
        while self._hooks:
            self._hooks.pop().remove()
        for root in self._transformers.values():
            if getattr(root, ATTRIBUTE, None) is self:
                delattr(root, ATTRIBUTE)
        self._transformers = {}
        _enabled.discard(self)
        _unregister_unused()

    def _hook(self, name: str, root: nn.Module) -> None:
        family = family_of(root)
        if isinstance(family, str):
            self.declined[name] = family
            log.warning("LiteAttention: %s stays dense: %s", name, family)
            return

        def begin(arguments: Arguments, context: Any) -> TransformerCall | None:
            return self._begin(name, family, arguments, root.config, context)

        layers = self_attention(root, family)
        self._hooks.append(TransformerHook(root, layers, family.processors, begin, self.reset))

    def _begin(
        self, name: str, family: Family, arguments: Arguments, config: Any, context: Any
    ) -> TransformerCall | None:
        """One call of the transformer ``name`` starts: find its run, or start one."""
        if self._calling:  # the call before this one raised an exception
            self.reset()
        device = arguments["hidden_states"].device
        backend = backend_for(device, self.settings.qk)
        if isinstance(backend, str) or not self.settings.skips:
            reason = backend if isinstance(backend, str) else "the threshold is at its safest"
            self._last = RunReport(describe(self.settings), "none", 0, 0, {}, (), {reason: 1}, ())
            return None
        grid = family.grid(arguments, config)
        now = self._moment(family, arguments, context)
        if self._trajectory is None or not self._trajectory.continues(name, now):
            self.reset()
            self._trajectory = Trajectory(now)
        progress = self._trajectory.advance(name, now)
        run = self._trajectory.runs.get(name)
        if run is None:
            settings = _pin(self.settings, given_tokens(family, arguments, config, grid))
            run = Run(settings, backend, self._trajectory.countdown())
            self._trajectory.runs[name] = run
        self._calling = True
        prefix = f"{name}." if len(self._transformers) > 1 else ""
        place = Place(progress, now.stream, device, prefix)
        video = partial(video_tokens, family, arguments, grid)
        return TransformerCall(run, place, video, self._returned)

    def _returned(self) -> None:
        self._calling = False

    def _moment(self, family: Family, arguments: Arguments, context: Any) -> Moment:
        """What this call tells about where it is."""
        stream = context.name if context else name_stream(arguments.get("encoder_hidden_states"))
        step, steps = (context.step_index, context.num_inference_steps) if context else (None, None)
        timestep = torch.as_tensor(arguments["timestep"])
        level = float(timestep.max())
        scheduler = getattr(self._pipeline(), "scheduler", None)
        levels = noise_levels(scheduler, level, timestep.dtype)
        # A new list of timesteps is a new run, in whatever form the model is told of them.
        schedule = getattr(scheduler, "timesteps", None) if levels else None
        if family.rising:
            level, levels = RISING_END - level, tuple(RISING_END - x for x in levels)
        return Moment(stream, step, steps, level, schedule, levels)


#: Sessions that hold hooks. Our backend is registered with diffusers as long as there are any.
_enabled: weakref.WeakSet[Session] = weakref.WeakSet()


def _unregister_unused() -> None:
    """Leave nothing in diffusers once no session is alive and enabled."""
    if next(iter(_enabled), None) is None:
        unregister_backend()


def session_on(root: nn.Module) -> Session | None:
    """The session that a transformer carries."""
    return getattr(root, ATTRIBUTE, None)


def _pin(settings: Settings, tokens: TokenRanges) -> Settings:
    """Settings that also never skip at these tokens."""
    return replace(
        settings,
        dense_keys=settings.dense_keys + tokens,
        dense_queries=settings.dense_queries + tokens,
    )
