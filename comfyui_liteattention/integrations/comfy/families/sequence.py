"""What a model is called with, and the form of its self-attention over the video that results."""

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
    """The form of a self-attention call over the video.

    ``lengths``: the sequence lengths that it can have (one, except for unknown models). ``video``:
    where the video lies in it; None where all tokens are video, on an unknown grid. ``note`` goes
    to the report. ``unknown``: the class of a model that has no family here.
    """

    lengths: frozenset[int]
    video: VideoTokens | None
    note: str = ""
    unknown: str = ""

    def misfit(self, length: int) -> str | None:
        """Why a call of this length is not the video's self-attention, or None."""
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
#: The functions that find the form, by the module and the name of ComfyUI's model class.
Family = Mapping[tuple[str, str], Describe]


def sequence(grid: Grid, before: int = 0, after: int = 0) -> Form:
    """The form of a sequence with other tokens before and after the video's."""
    video = VideoTokens(grid, before)
    return Form(frozenset({video.stop + after}), video)


def grid_of(shape: Sequence[int], patch: Sequence[int]) -> Grid:
    """Frames, rows and columns of tokens of a latent ``[..., T, H, W]``; an image has one frame."""
    sizes = [1, *shape[2:]][-3:]
    patch = [1, *patch][-3:]
    frames, rows, columns = (-(-size // p) for size, p in zip(sizes, patch, strict=True))
    return frames, rows, columns


def tokens_of(latent: Any, patch: Sequence[int]) -> int:
    """Number of tokens of a conditioning latent; 0 for None."""
    return 0 if latent is None else prod(grid_of(latent.shape, patch))


def unsupported(reason: str) -> Describe:
    """A model that is known not to work, and why."""
    return lambda model, call: reason
