"""Which models are understood: where the video tokens of a self-attention call lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..order import Grid, VideoTokens


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


def token_grid(diffusion_model: Any, latent: Sequence[int]) -> Grid | None:
    """Frames, rows and columns of tokens that a latent ``[B, C, T, H, W]`` is cut into."""
    patch = getattr(diffusion_model, "patch_size", None)
    if len(latent) != 5 or not isinstance(patch, (tuple, list)) or len(patch) != 3:
        return None
    frames, rows, columns = (-(-size // p) for size, p in zip(latent[2:], patch, strict=True))
    return frames, rows, columns


def video_tokens(grid: Grid | None, length: int) -> VideoTokens | None:
    """Where the video lies in a sequence of ``length`` tokens; None where that is not known."""
    if grid is None or VideoTokens(grid).stop != length:
        return None
    return VideoTokens(grid)
