"""ComfyUI: give every sampling run of a model its own :class:`~..run.Run`.

The node only adds one OUTER_SAMPLE wrapper to a clone of the model. When a run starts, the wrapper
installs an attention override into the options of that run, around whatever override is there by
then, so that it does not matter in which order nodes were applied; when the run ends, however it
ends, nothing remains but a report.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

from ..backends import Backend, backend_for
from ..eligibility import CROSS_ATTENTION, dense_reason
from ..report import RunReport, node_line, status_line
from ..run import Run
from ..schedule import Progress
from ..settings import Settings, describe
from .models import Form, FormOrReason, ModelCall, describe_call

log = logging.getLogger(__name__)

KEY = "liteattention"
OVERRIDE = "optimized_attention_override"
NEVER_ASKED = "the model did not pass any attention call on to LiteAttention"
WrappersMP = comfy.patcher_extension.WrappersMP
Show = Callable[[str], None]


class Patch:
    """What the patch node attaches to a model: the settings, and the report of the last run.

    ``show`` gets a line of text for the user whenever there is something new to say.
    """

    def __init__(self, settings: Settings, show: Show | None = None) -> None:
        self.settings = settings
        self.show = show
        self.last_report: RunReport | None = None

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """OUTER_SAMPLE wrapper: one run, from its first to its last model call."""
        guider = executor.class_obj
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        backend = _backend(guider.model_patcher)
        if isinstance(backend, str) or not self.settings.skips:
            reason = backend if isinstance(backend, str) else "the threshold is at its safest"
            self._end(_inactive(self.settings, reason, len(sigmas) - 1))
            return executor(*args, **kwargs)
        run = Run(self.settings, backend, sigmas.tolist())
        notes: list[str] = []
        options = guider.model_options.setdefault("transformer_options", {})
        _install(options, run, notes, self.show)
        try:
            return executor(*args, **kwargs)
        finally:
            self._end(_annotate(run.finish(), notes))

    def _end(self, report: RunReport) -> None:
        self.last_report = report
        log.info(status_line(report))
        if self.show is not None:
            self.show(node_line(report))


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


class Forward:
    """One call of the diffusion model: which step, which streams, how many layers so far.

    It travels in that call's ``transformer_options``, so threads can't mix it up.
    """

    def __init__(self, progress: Progress, streams: Sequence[Stream], form: FormOrReason) -> None:
        self.progress = progress
        self.streams = streams
        self.form = form
        self._calls: Counter[str] = Counter()

    def next_layer(self, options: dict[str, Any]) -> str:
        """Name of the layer that attends now: the model's own index, and the order of calls.

        The order tells apart layers without an index, and several attentions of one block.
        """
        index = options.get("block_index")
        block = "" if index is None else f"{options.get('block_type', 'block')}-{index}."
        number = self._calls[block]
        self._calls[block] += 1
        return f"{block}{number}"


def _install(options: dict[str, Any], run: Run, notes: list[str], show: Show | None = None) -> None:
    """Put the hooks of one run into the transformer options of that run; ``notes`` collects what
    its report should say."""
    options[OVERRIDE] = _make_override(run, options.get(OVERRIDE))
    comfy.patcher_extension.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, KEY, _make_apply_model(run, notes, show), options
    )


def _make_apply_model(run: Run, notes: list[str], show: Show | None) -> Callable[..., Any]:
    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[5]
        x = args[0]
        progress = run.locate(float(options["sigmas"][0]))
        form = describe_call(executor.class_obj.diffusion_model, _model_call(args, kwargs))
        options[KEY] = Forward(progress, _streams(options, x.device), form)
        if isinstance(form, Form) and form.note and form.note not in notes:
            notes.append(form.note)
            log.info("LiteAttention: %s", form.note)
        started = time.perf_counter()
        try:
            return executor(*args, **kwargs)
        finally:
            run.time_step(progress.step, time.perf_counter() - started)
            options.pop(KEY, None)
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


def _make_override(run: Run, previous: Callable[..., Tensor] | None) -> Callable[..., Tensor]:
    """The attention override: what LiteAttention declines goes to whoever was there before."""

    def override(
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        options = kwargs.get("transformer_options") or {}
        passed = dict(
            kwargs,
            mask=mask,
            attn_precision=attn_precision,
            skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape,
        )
        inner = func if previous is None else partial(previous, func)
        dense = partial(inner, q, k, v, heads, **passed)
        if skip_reshape:
            split = (q, k, v)
        else:
            split = tuple(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        reason = _ineligible(options, mask, kwargs)
        if reason is None:
            forward = options[KEY]
            reason = dense_reason(*split, len(forward.streams), run.settings, run.backend)
            reason = reason or forward.form.misfit(split[0].shape[2])
        if reason is not None:
            if run.decline(reason) and reason != CROSS_ATTENTION:
                log.info("LiteAttention: calls stay dense: %s", reason)
            return dense()
        scale = kwargs.get("scale") or split[0].shape[-1] ** -0.5
        layer = forward.next_layer(options)
        progress, video = forward.progress, forward.form.video
        out = run.attend(layer, forward.streams, progress, *split, scale, video, dense)
        if out is None:
            return dense()
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override


def _ineligible(options: dict[str, Any], mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    """Why ComfyUI's own arguments rule this call out, or None."""
    forward = options.get(KEY)
    if forward is None:
        return "the call came from outside the diffusion model"
    if mask is not None:
        return "a mask (regional prompt or padding)"
    if kwargs.get("enable_gqa"):
        return "grouped or uneven heads (q, k and v have different shapes)"
    if kwargs.get("low_precision_attention") is False:
        return "the model asks for exact attention here"
    return forward.form if isinstance(forward.form, str) else None


def _annotate(report: RunReport, notes: Sequence[str]) -> RunReport:
    """The report with what only the host knows."""
    reasons = report.reasons if report.calls or report.reasons else {NEVER_ASKED: 1}
    return replace(report, notes=(*notes, *report.notes), reasons=reasons)


def _inactive(settings: Settings, reason: str, steps: int) -> RunReport:
    """The report of a run that never asked LiteAttention."""
    return RunReport(describe(settings), "none", steps, 0.0, {}, (), {reason: 1}, ())


class Stream(NamedTuple):
    """What must never share tiles: conditionings, context windows, devices, and passes with other
    blocks (skip-layer guidance asks the same conditioning again, with fewer layers)."""

    kind: int
    uuid: Any
    window: tuple[int, ...] | None
    device: str
    replaced: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = {0: "positive", 1: "negative"}.get(self.kind, f"conditioning {self.kind}")
        if self.window is not None:
            name += f" {self.window[0]}-{self.window[-1]}"
        return f"{name} with replaced blocks" if self.replaced else name


def _streams(options: dict[str, Any], device: torch.device) -> list[Stream]:
    """One key per batch part."""
    context = options.get("context_window")
    window = None if context is None else tuple(context.index_list)
    kinds = options.get("cond_or_uncond") or [0]
    uuids = options.get("uuids") or range(len(kinds))
    replaced = tuple(sorted(map(str, options.get("patches_replace", {}).get("dit", ()))))
    return [
        Stream(kind, uuid, window, str(device), replaced)
        for kind, uuid in zip(kinds, uuids, strict=True)
    ]


def _backend(model_patcher: Any) -> Backend | str:
    return backend_for(torch.device(model_patcher.load_device))
