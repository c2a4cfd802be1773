"""What the node says where there is no whole run: before the first step has ended, which takes half
a minute on long videos, and where a run was cut short."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.nn import ModuleList

from ...report.statistics import RunReport, node_line
from ...settings import Settings
from .families import Form, FormOrReason

#: Where the models of ComfyUI keep the blocks that attend to the video.
BLOCKS = (
    "blocks",
    "double_blocks",
    "single_blocks",
    "transformer_blocks",
    "visual_transformer_blocks",
)


def while_loading(steps: int) -> str:
    """Before the model is called: ComfyUI may have to load it first."""
    return f"waiting for the model; then step 1/{steps} computes everything"


def before_a_step(
    form: FormOrReason, model: Any, step: int, steps: int, settings: Settings
) -> str | None:
    """Said when the model is called; None where what was said before still holds."""
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
    """Of a run that was interrupted, or ended in an error: how far it came, not why it skipped
    nothing."""
    text = f"interrupted after {len(report.step_seconds)} of {report.steps} steps"
    return f"{text}; until then {node_line(report)}" if report.active else text


def _blocks(model: Any) -> list[ModuleList]:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    found = (getattr(model, name, None) for name in BLOCKS)
    return [blocks for blocks in found if isinstance(blocks, ModuleList)]


def in_comfyui(text: str) -> str:
    """A line for the node, where nobody has attention of their own."""
    return text.replace("your own attention", "ComfyUI's attention")
