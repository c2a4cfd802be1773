"""diffusers: LiteAttention on the transformers of one pipeline."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import backend_for
from ..eligibility import CROSS_ATTENTION, dense_reason
from ..order import Grid
from ..report import RunReport, status_line, text_table
from ..run import Run
from ..schedule import Progress
from ..settings import Settings, describe
from .diffusers_hooks import TransformerHook, register_backend, unregister_backend
from .diffusers_runs import Moment, Trajectory, conditioning_tokens, name_stream
from .models import video_tokens

log = logging.getLogger(__name__)

ATTRIBUTE = "_liteattention"


def _latent_grid(arguments: dict[str, Any], config: Any) -> Grid:
    """The token grid of a transformer that is given a latent ``[B, C, T, H, W]``."""
    sizes = arguments["hidden_states"].shape[2:]
    frames, rows, columns = (n // p for n, p in zip(sizes, config.patch_size, strict=True))
    return frames, rows, columns


def _told_grid(arguments: dict[str, Any], config: Any) -> Grid | None:
    """The token grid of a transformer that is given tokens and told their grid."""
    frames, rows, columns = (arguments.get(n) for n in ("num_frames", "height", "width"))
    if frames is None or rows is None or columns is None:
        return None
    return frames, rows, columns


class Family(NamedTuple):
    """Where a transformer class has its self-attention over video tokens, who computes it, and how
    the token grid follows from the arguments of ``forward`` and the transformer's config."""

    layer: str
    processor: str
    grid: Callable[[dict[str, Any], Any], Grid | None]


#: By class name. Models with text tokens in their self-attention are not here yet: those would
#: have to be pinned first.
FAMILIES = {
    "WanTransformer3DModel": Family("attn1", "WanAttnProcessor", _latent_grid),
    "WanVACETransformer3DModel": Family("attn1", "WanAttnProcessor", _latent_grid),
    "LTXVideoTransformer3DModel": Family("attn1", "LTXVideoAttnProcessor", _told_grid),
}


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
        if not _enabled:
            unregister_backend()

    def _hook(self, name: str, root: nn.Module) -> None:
        family = _family(root)
        if isinstance(family, str):
            self.declined[name] = family
            log.warning("LiteAttention: %s stays dense: %s", name, family)
            return
        layers = [n for n, _ in root.named_modules() if n.rpartition(".")[2] == family.layer]

        def begin(arguments: dict[str, Any], context: Any) -> _Call | None:
            return self._begin(name, arguments, context, family.grid(arguments, root.config))

        self._hooks.append(TransformerHook(root, layers, family.processor, begin, self.reset))

    def _begin(
        self, name: str, arguments: dict[str, Any], context: Any, grid: Grid | None
    ) -> _Call | None:
        """One call of the transformer ``name`` starts: find its run, or start one."""
        if self._calling:  # the call before this one raised an exception
            self.reset()
        device = arguments["hidden_states"].device
        backend = backend_for(device)
        if isinstance(backend, str) or not self.settings.skips:
            reason = backend if isinstance(backend, str) else "the threshold is at its safest"
            self._last = RunReport(describe(self.settings), "none", 0, 0, {}, (), {reason: 1}, ())
            return None
        now = self._moment(arguments, context)
        if self._trajectory is None or not self._trajectory.continues(name, now):
            self.reset()
            self._trajectory = Trajectory(now)
        progress = self._trajectory.advance(name, now)
        run = self._trajectory.runs.get(name)
        if run is None:
            settings = _pin(self.settings, conditioning_tokens(arguments["timestep"]))
            run = Run(settings, backend, self._trajectory.countdown())
            self._trajectory.runs[name] = run
        self._calling = True
        prefix = f"{name}." if len(self._transformers) > 1 else ""
        return _Call(self, run, progress, now.stream, device, prefix, grid)

    def _moment(self, arguments: dict[str, Any], context: Any) -> Moment:
        """What this call tells about where it is."""
        stream = context.name if context else name_stream(arguments.get("encoder_hidden_states"))
        step, steps = (context.step_index, context.num_inference_steps) if context else (None, None)
        level = float(arguments["timestep"].max())
        schedule = getattr(getattr(self._pipeline(), "scheduler", None), "timesteps", None)
        if schedule is not None and not (schedule == level).any():
            schedule = None  # the caller goes by other noise levels
        return Moment(stream, step, steps, level, schedule)


class _Call:
    """One call of a transformer: which run, where in it, which conditioning."""

    def __init__(
        self,
        session: Session,
        run: Run,
        progress: Progress,
        stream: str,
        device: torch.device,
        prefix: str,
        grid: Grid | None,
    ) -> None:
        self._session = session
        self._run = run
        self._progress = progress
        self._stream = stream
        self._device = device
        self._prefix = prefix
        self._grid = grid
        # Checkpointed layers run once without gradients before they run with them.
        self._training = torch.is_grad_enabled()

    def attend(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None, extra: str | None
    ) -> Tensor | None:
        """See :class:`.diffusers_hooks.Call`."""
        reason = extra or self._ineligible(q)
        reason = reason or dense_reason(q, k, v, 1, self._run.settings, self._run.backend)
        if reason is not None:
            self.decline(reason)
            return None
        # A pipeline may stop guiding in the middle of a run: the batch halves, and starts afresh.
        batch = q.shape[0]
        stream = self._stream if batch == 1 else f"{self._stream} x{batch}"
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        name = self._prefix + layer.rpartition(".")[0]
        video = video_tokens(self._grid, q.shape[2])
        return self._run.attend(name, [stream], self._progress, q, k, v, scale, video)

    def decline(self, reason: str) -> None:
        """Count a call that stays dense."""
        if self._run.decline(reason) and reason != CROSS_ATTENTION:
            log.info("LiteAttention: calls stay dense: %s", reason)

    def end(self, seconds: float) -> None:
        """The transformer returned."""
        self._session._calling = False
        self._run.time_step(self._progress.step, seconds)

    def _ineligible(self, q: Tensor) -> str | None:
        if self._training:
            return "gradients are enabled (training; otherwise use torch.no_grad())"
        if q.device != self._device:
            return "the transformer is spread over several devices"
        return None


#: Sessions that hold hooks. Our backend is registered with diffusers as long as there are any.
_enabled: weakref.WeakSet[Session] = weakref.WeakSet()


def session_on(root: nn.Module) -> Session | None:
    """The session that a transformer carries."""
    return getattr(root, ATTRIBUTE, None)


def _family(root: nn.Module) -> Family | str:
    """Where the self-attention of a transformer is, or why we can't tell."""
    cls = type(root)
    if cls.__module__.startswith("diffusers.") and cls.__name__ in FAMILIES:
        return FAMILIES[cls.__name__]
    return f"{cls.__name__} is not supported yet"


def _pin(settings: Settings, tokens: tuple[tuple[int, int], ...]) -> Settings:
    """Settings that also never skip at these tokens."""
    return replace(
        settings,
        dense_keys=settings.dense_keys + tokens,
        dense_queries=settings.dense_queries + tokens,
    )
