"""Which models are understood: where the video tokens of a self-attention call lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoModel:
    """One family of models.

    ``module`` is the end of the Python module that defines ComfyUI's diffusion model class.
    ``note`` says what was verified, for the documentation.
    """

    name: str
    module: str
    note: str


#: Models whose self-attention sees video tokens only. Joint text-video models are not here yet:
#: their text tokens would have to be pinned first.
VIDEO_ONLY = (VideoModel("Wan", "comfy.ldm.wan.model", "2.1 T2V architecture, ComfyUI 0.3.75"),)


def recognise(diffusion_model: object) -> VideoModel | None:
    """The family of a loaded ComfyUI diffusion model, or None when it is not understood."""
    module = type(diffusion_model).__module__
    return next((m for m in VIDEO_ONLY if module.endswith(m.module)), None)
