"""ComfyUI: the hooks of one sampling run. They live only in the run's transformer options."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.patcher_extension

from ...report.statistics import RunReport
from ...run import Run
from .calls import Forward, User
from .families import Form, ModelCall, describe_call
from .first_words import before_a_step, in_comfyui
from .hooks import install
from .layers import LayerCalls, Names
from .stale_graph import MADE_ANEW, made_anew
from .streams import Streams, names_of
from .takers import asked_first, explained, taker

log = logging.getLogger(__name__)

KEY = "liteattention"
WrappersMP = comfy.patcher_extension.WrappersMP


class Sampling:
    """The hooks of one run, and what only the ComfyUI side knows about it. ``conds``: the guider's
    conditionings, by name."""

    def __init__(
        self, run: Run, show: Callable[[str], None] | None = None, conds: Any = None
    ) -> None:
        self._run = run
        self._show = show
        self._streams = Streams(names_of(conds))
        self._names = Names()
        self._notes: dict[str, None] = {}
        self._first: str | None = None
        self._previous: User | None = None

    def install(self, options: dict[str, Any]) -> None:
        """Put the hooks into the transformer options of the run."""
        self._previous = install(options)
        for kind, wrapper in (
            (WrappersMP.PREDICT_NOISE, self._predict_noise),
            (WrappersMP.APPLY_MODEL, self._apply_model),
        ):
            comfy.patcher_extension.add_wrapper_with_key(kind, KEY, wrapper, options)

    def finish(self, model_patcher: Any, options: Mapping[str, Any]) -> RunReport:
        """End the run and return its report."""
        report, notes = self._run.finish(), [*self._notes]
        reasons = report.reasons
        if not report.calls:
            reasons = explained(reasons, taker(model_patcher, options, self._first))
        elif self._first is not None:
            notes.append(f"{self._first} is asked first: LiteAttention gets what it leaves")
        if missing := self._names.beyond(self._run.settings.dense_layers):
            numbers = ", ".join(map(str, missing))
            notes.append(f"dense_layers: there is no layer {numbers}; layers count from 0")
        return replace(report, notes=(*notes, *report.notes), reasons=reasons)

    def _predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._streams.evaluation()
        return executor(*args, **kwargs)

    def _apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        run = self._run
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
        # torch.compile wraps the model in an object of its own.
        model = executor.class_obj.diffusion_model
        model = getattr(model, "_orig_mod", model)
        self._first = asked_first(options) or self._first
        progress = run.locate(float(options["sigmas"][0]))
        form = describe_call(model, _model_call(args, kwargs))
        if self._show is not None:
            text = before_a_step(form, model, progress.step, len(run.sigmas) - 1, run.settings)
            if text is not None:
                self._show(text)
        if isinstance(form, Form) and form.note and form.note not in self._notes:
            self._notes[form.note] = None
            log.info("LiteAttention: %s", form.note)
        streams = self._streams.of_call(options, args[0].device)
        layers = LayerCalls(self._names, model)
        started = time.perf_counter()
        run.begin_call(progress.step)
        forward = Forward(run, progress, streams, form, layers, self._previous)
        with forward.entered():
            out = executor(*args, **kwargs)
        if made_anew(model, options, forward.asked):
            self._notes[MADE_ANEW] = None
        if not run.end_call(progress.step, time.perf_counter() - started):
            out = executor(*args, **kwargs)  # not entered, so all its attention is the user's own
        if self._show is not None:
            self._show(in_comfyui(run.progress_text(progress.step)))
        return out


def _model_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModelCall:
    """What an APPLY_MODEL call ``(x, t, c_concat, c_crossattn, control, options, **conds)`` says
    about the sequence. Several latents (video and sound) come packed into one, with
    ``latent_shapes`` giving their shapes, the video's first."""
    text = kwargs["c_crossattn"] if "c_crossattn" in kwargs else args[3]
    packed = kwargs.get("latent_shapes")
    latent = packed[0] if packed else args[0].shape
    return ModelCall(latent, 0 if text is None else text.shape[1], kwargs)
