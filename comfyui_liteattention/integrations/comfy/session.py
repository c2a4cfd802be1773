"""ComfyUI: give every sampling run of a model its own :class:`~..run.Run`.

The node only adds one OUTER_SAMPLE wrapper to a clone of the model. When a run starts, the wrapper
installs an attention override into the options of that run, around whatever override is there
already, so the order of the nodes does not matter. When the run ends, in whatever way, only its
report remains.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import torch

from ...backends import backend_for
from ...backends.base import Provider
from ...budget.closeness import strength_of
from ...report.statistics import RunReport, node_line, status_line
from ...run import Run
from ...schedule import noise_fractions
from ...settings import Settings, describe
from .compiler import paused
from .first_words import in_comfyui, when_cut_short, while_loading
from .hooks import OVERRIDE, attention_in_use, is_ours
from .sampler_nodes import sampling_node
from .sampling import KEY, Sampling

log = logging.getLogger(__name__)

KEPT = 8  # reports at most: in a loop, each sampling has a new node id
WrappersMP = comfy.patcher_extension.WrappersMP
Show = Callable[[str], None]


class Patch:
    """What the patch node attaches to a model: the settings, and the reports of the last runs.

    ``show`` is called with a line of text for the user whenever there is something new to say.
    ``reports``: by the id of the node that sampled (None outside of a graph), the latest last.
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
        options = guider.model_options.setdefault("transformer_options", {})
        if is_ours(options.get(OVERRIDE)):  # called twice, because a pack has copied this wrapper
            return executor(*args, **kwargs)
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        backend = _backend(guider.model_patcher, self.settings, attention_in_use(options))
        if isinstance(backend, str) or not self.settings.skips:
            reason = backend if isinstance(backend, str) else "the threshold is at its safest"
            self._end(_inactive(self.settings, reason, len(sigmas) - 1))
            return executor(*args, **kwargs)
        self._say(while_loading(len(sigmas) - 1))
        kind = type(guider.model_patcher.model.diffusion_model).__name__, attention_in_use(options)
        levels = noise_fractions(sigmas.tolist(), _is_flow(guider.model_patcher))
        strength = _guidance(guider)
        run = Run(self.settings, backend, sigmas.tolist(), kind, paused, levels, strength)
        sampling = Sampling(run, self.show, getattr(guider, "conds", None))
        sampling.install(options)
        whole = False
        try:
            out = executor(*args, **kwargs)
            whole = True
            return out
        finally:
            self._end(sampling.finish(guider.model_patcher, options), whole)

    def _end(self, report: RunReport, whole: bool = True) -> None:
        node = sampling_node()
        # Drop the old report of this node, and of the node (a loop) that it was expanded from.
        for former in (node, node and node.partition(".")[0]):
            self.reports.pop(former, None)
        self.reports[node] = report
        for old in list(self.reports)[:-KEPT]:
            del self.reports[old]
        try:
            text = node_line(report) if whole else when_cut_short(report)
            log.info(status_line(report) if whole else f"LiteAttention: {text}")
            self._say(in_comfyui(text))
        except Exception as error:  # a line of text must not cost a finished video
            log.warning("LiteAttention: the report can't be shown: %s", error)

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


def _inactive(settings: Settings, reason: str, steps: int) -> RunReport:
    """The report of a run in which LiteAttention stayed off."""
    return RunReport(describe(settings), "none", steps, 0.0, {}, (), {reason: 1}, ())


def _is_flow(model_patcher: Any) -> bool:
    """Whether the model is a rectified flow, whose sigmas are noise fractions of the latent."""
    sampling = model_patcher.get_model_object("model_sampling")
    return isinstance(sampling, comfy.model_sampling.CONST)


def _guidance(guider: Any) -> float:
    """The strength of guidance. Guiders that combine predictions in a way of their own are taken
    for what closeness was calibrated with."""
    plain = getattr(comfy.samplers.CFGGuider, "predict_noise", None)
    is_plain = getattr(type(guider), "predict_noise", None) is plain
    return strength_of(getattr(guider, "cfg", None) if is_plain else None)


def _backend(model_patcher: Any, settings: Settings, attention: str) -> Provider | str:
    device = torch.device(model_patcher.load_device)
    return backend_for(device, settings.mode, attention, settings.criterion)
