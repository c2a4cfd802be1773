"""What the node says before the first step has ended, which can take half a minute on long videos,
and after an interrupted run."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.nn import ModuleList

from ...report.statistics import RunReport, node_line
from ...settings import Settings
from .families import Form, FormOrReason

#: Attributes in which ComfyUI's models keep the blocks that attend to the video.
BLOCKS = (
    "blocks",
    "double_blocks",
    "single_blocks",
    "transformer_blocks",
    "visual_transformer_blocks",
)


def while_loading(steps: int) -> str:
    """The text before the first call of the model, which ComfyUI may have to load."""
    return f"waiting for the model; then step 1/{steps} computes everything"


def before_a_step(
    form: FormOrReason, model: Any, step: int, steps: int, settings: Settings
) -> str | None:
    """The text for a call of the model; None to leave the node's text as it is."""
    if not isinstance(form, Form):
        return f"inactive: {form}"
    tokens = prod(form.video.grid) if form.video else max(form.lengths)
    if max(form.lengths) < settings.min_tokens:
        return f"inactive: short sequence (fewer than {settings.min_tokens} tokens)"
    if step:
        return None
    layers = sum(len(blocks) for blocks in _blocks(model))
    where = f"{layers} layers, {tokens:,} tokens" if layers else f"{tokens:,} tokens"
    return f"step 1/{steps} computes everything ({where}); skipping begins after it"


def when_cut_short(report: RunReport) -> str:
    """The text after a run that was interrupted or failed: how far it came."""
    text = f"interrupted after {len(report.step_seconds)} of {report.steps} steps"
    return f"{text}; until then {node_line(report)}" if report.active else text


def _blocks(model: Any) -> list[ModuleList]:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    found = (getattr(model, name, None) for name in BLOCKS)
    return [blocks for blocks in found if isinstance(blocks, ModuleList)]


def in_comfyui(text: str) -> str:
    """A line in the words of ComfyUI's users, who don't call an attention their own."""
    return text.replace("your own attention", "ComfyUI's attention")
