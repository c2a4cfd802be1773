"""What a model is called with, and what its self-attention over the video looks like then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ....token_order import Grid, VideoTokens


class ModelCall(NamedTuple):
    """What ComfyUI calls a diffusion model with.

    ``latent``: the shape ``[B, C, T, H, W]`` or ``[B, C, H, W]``; ``text``: tokens of the text
    conditioning; ``conds``: the other conditionings by name.
    """

    latent: Sequence[int]
    text: int
    conds: Mapping[str, Any]


class Form(NamedTuple):
    """What a self-attention call over the video looks like.

    ``lengths`` that it can have (one, but for unknown models) and the place of the video in it;
    ``video`` is None where all tokens are video on an unknown grid. ``note`` is for the report.
    ``unknown``: the class of a model that nobody has looked at.
    """

    lengths: frozenset[int]
    video: VideoTokens | None
    note: str = ""
    unknown: str = ""

    def misfit(self, length: int) -> str | None:
        """Why a call of this length is not the one that is meant, or None."""
        if length in self.lengths:
            return None
        expected = " or ".join(map(str, sorted(self.lengths)))
        if self.unknown and length > min(self.lengths):
            return (
                f"{self.unknown} is not supported yet: its attention sees {length} tokens, and the "
                f"video has {expected}"
            )
        return f"not the model's video attention ({length} tokens; that has {expected})"


FormOrReason = Form | str
Describe = Callable[[Any, ModelCall], FormOrReason]
#: A family: how the sequence is found, by the module and the name of ComfyUI's class.
Family = Mapping[tuple[str, str], Describe]


def sequence(grid: Grid, before: int = 0, after: int = 0) -> Form:
    """The video's tokens with others before and after them."""
    video = VideoTokens(grid, before)
    return Form(frozenset({video.stop + after}), video)


def grid_of(shape: Sequence[int], patch: Sequence[int]) -> Grid:
    """Frames, rows and columns of tokens of a latent ``[..., T, H, W]``; an image has one frame."""
    sizes = [1, *shape[2:]][-3:]
    patch = [1, *patch][-3:]
    frames, rows, columns = (-(-size // p) for size, p in zip(sizes, patch, strict=True))
    return frames, rows, columns


def tokens_of(latent: Any, patch: Sequence[int]) -> int:
    """Tokens that a conditioning latent is cut into; None has none."""
    return 0 if latent is None else prod(grid_of(latent.shape, patch))


def unsupported(reason: str) -> Describe:
    """A model that is known not to work, and why."""
    return lambda model, call: reason
