"""ComfyUI: give every sampling run of a model its own :class:`~..run.Run`.

The node only adds one OUTER_SAMPLE wrapper to a clone of the model. When a run starts, the wrapper
installs an attention override into the options of that run, around whatever override is there by
then, so that it does not matter in which order nodes were applied; when the run ends, however it
ends, nothing remains but a report.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.patcher_extension
import torch

from ...backends import backend_for
from ...backends.base import Provider
from ...report.statistics import RunReport, node_line, status_line
from ...run import Run
from ...settings import Settings, describe
from .calls import Forward, User, streams_of
from .families import Form, ModelCall, describe_call
from .first_words import before_a_step, while_loading
from .hooks import install
from .sampler_nodes import sampling_node

log = logging.getLogger(__name__)

KEY = "liteattention"
KEPT = 8  # reports: loops sample under ever new node ids
NEVER_ASKED = "the model did not pass any attention call on to LiteAttention"
WrappersMP = comfy.patcher_extension.WrappersMP
Show = Callable[[str], None]


class Patch:
    """What the patch node attaches to a model: the settings, and the reports of the last runs.

    ``show`` gets a line of text for the user whenever there is something new to say. ``reports``:
    by the node that sampled (None outside of a graph), the latest last.
    """

    def __init__(self, settings: Settings, show: Show | None = None) -> None:
        self.settings = settings
        self.show = show
        self.reports: dict[str | None, RunReport] = {}

    @property
    def last_report(self) -> RunReport | None:
        return next(reversed(self.reports.values()), None)

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE wrapper: one run, from its first to its last model call."""
        guider = executor.class_obj
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        backend = _backend(guider.model_patcher, self.settings)
        if isinstance(backend, str) or not self.settings.skips:
            reason = backend if isinstance(backend, str) else "the threshold is at its safest"
            self._end(_inactive(self.settings, reason, len(sigmas) - 1))
            return executor(*args, **kwargs)
        self._say(while_loading(len(sigmas) - 1))
        run = Run(self.settings, backend, sigmas.tolist())
        notes: list[str] = []
        options = guider.model_options.setdefault("transformer_options", {})
        _install(options, run, notes, self.show)
        try:
            return executor(*args, **kwargs)
        finally:
            self._end(_annotate(run.finish(), notes))

    def _end(self, report: RunReport) -> None:
        node = sampling_node()
        self.reports.pop(node, None)
        self.reports[node] = report
        for old in list(self.reports)[:-KEPT]:
            del self.reports[old]
        log.info(status_line(report))
        self._say(node_line(report))

    def _say(self, text: str) -> None:
        if self.show is not None:
            self.show(text)


def apply_patch(model: Any, settings: Settings, show: Show | None = None) -> Any:
    """A clone of a MODEL that runs with LiteAttention; an earlier patch is replaced."""
    model = remove_patch(model)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, Patch(settings, show).outer_sample)
    return model


def remove_patch(model: Any) -> Any:
    """A clone of the model without LiteAttention."""
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    return model


def patch_of(model: Any) -> Patch | None:
    """The patch that a MODEL carries, or None. Clones of a patched model share it."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return wrappers[0].__self__ if wrappers else None


def _install(options: dict[str, Any], run: Run, notes: list[str], show: Show | None = None) -> None:
    """Put the hooks of one run into the transformer options of that run; ``notes`` collects what
    its report should say."""
    previous = install(options)
    comfy.patcher_extension.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, KEY, _make_apply_model(run, previous, notes, show), options
    )


def _make_apply_model(
    run: Run, previous: User | None, notes: list[str], show: Show | None
) -> Callable[..., Any]:
    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
        progress = run.locate(float(options["sigmas"][0]))
        model = executor.class_obj.diffusion_model
        form = describe_call(model, _model_call(args, kwargs))
        if show is not None:
            text = before_a_step(form, model, progress.step, len(run.sigmas) - 1, run.settings)
            if text is not None:
                show(text)
        if isinstance(form, Form) and form.note and form.note not in notes:
            notes.append(form.note)
            log.info("LiteAttention: %s", form.note)
        streams = streams_of(options, args[0].device)
        started = time.perf_counter()
        try:
            with Forward(run, progress, streams, form, previous).entered():
                return executor(*args, **kwargs)
        finally:
            run.time_step(progress.step, time.perf_counter() - started)
            if show is not None:
                show(run.progress_text(progress.step))

    return apply_model


def _model_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModelCall:
    """What an APPLY_MODEL call ``(x, t, c_concat, c_crossattn, control, options, **conds)`` says
    about the sequence. Streams of several latents come packed, with their shapes beside them."""
    text = kwargs["c_crossattn"] if "c_crossattn" in kwargs else args[3]
    packed = kwargs.get("latent_shapes")
    latent = packed[0] if packed else args[0].shape
    return ModelCall(latent, 0 if text is None else text.shape[1], kwargs)


def _annotate(report: RunReport, notes: Sequence[str]) -> RunReport:
    """The report with what only the host knows."""
    reasons = report.reasons if report.calls or report.reasons else {NEVER_ASKED: 1}
    return replace(report, notes=(*notes, *report.notes), reasons=reasons)


def _inactive(settings: Settings, reason: str, steps: int) -> RunReport:
    """The report of a run that never asked LiteAttention."""
    return RunReport(describe(settings), "none", steps, 0.0, {}, (), {reason: 1}, ())


def _backend(model_patcher: Any, settings: Settings) -> Provider | str:
    return backend_for(torch.device(model_patcher.load_device), settings.qk)
