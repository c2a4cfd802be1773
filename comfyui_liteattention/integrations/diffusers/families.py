"""Which transformers of diffusers are supported, and what is known of each. Pure functions.

Skipping needs four facts about a transformer: which modules do self-attention over the video, which
attention processor classes compute plain attention there, how the video is cut into tokens, and
where these tokens lie in the sequence. All others (text, references) are never skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...token_order import Grid, TokenRanges, VideoTokens

#: Arguments of a transformer's ``forward``, by name.
Arguments = dict[str, Any]


NOT_FOUND = "where the video lies in the sequence could not be told"


def latent_grid(arguments: Arguments, config: Any) -> Grid:
    """The token grid of a transformer whose input is a latent ``[B, C, T, H, W]``."""
    return _cut(arguments["hidden_states"].shape[2:], config)


def frames_first_grid(arguments: Arguments, config: Any) -> Grid:
    """The token grid of a transformer whose input is a latent ``[B, T, C, H, W]``."""
    frames, _, rows, columns = arguments["hidden_states"].shape[1:]
    return _cut((frames, rows, columns), config)


def channels_last_grid(arguments: Arguments, config: Any) -> Grid:
    """The token grid of a transformer whose input is a latent ``[B, T, H, W, C]``."""
    return _cut(arguments["hidden_states"].shape[1:4], config)


def told_grid(arguments: Arguments, config: Any) -> Grid | None:
    """The token grid of a transformer whose input is tokens, with their grid as arguments."""
    frames, rows, columns = (arguments.get(n) for n in ("num_frames", "height", "width"))
    if frames is None or rows is None or columns is None:
        return None
    return frames, rows, columns


def packed_grid(arguments: Arguments, config: Any) -> Grid | None:
    """The token grid of MiniMax H3, whose sequence is packed: text, given frames and sound come
    before the video, and ``position_ids [L, 3]`` gives each token's frame, row and column."""
    first = int(arguments["audio_indices"].max()) + 1 if len(arguments["audio_indices"]) else 0
    places = arguments["position_ids"][first:]
    if not len(places):
        return None
    frame = int((places[:, 0] == places[0, 0]).sum())
    row = int((places[:frame, 1] == places[0, 1]).sum())
    grid = len(places) // frame, frame // row, row
    return grid if grid[0] * grid[1] * grid[2] == len(places) else None


def packed_timestep(arguments: Arguments) -> Tensor:
    """The timestep of the last token, which is video: ``timestep [N]`` lists the distinct ones,
    ``timestep_indices [L]`` says which of them each token has."""
    return arguments["timestep"][arguments["timestep_indices"][-1:]]


def told_timestep(arguments: Arguments) -> Any:
    """The timestep of a model that has only one."""
    return arguments["timestep"]


def video_first(arguments: Arguments, others: int) -> int:
    """Text, if there is any, comes after the video."""
    return 0


def video_last(arguments: Arguments, others: int) -> int:
    """Text or earlier frames come before the video."""
    return others


def video_between(arguments: Arguments, others: int) -> int:
    """Earlier frames come before the video, picture and text after it. The length of the text tells
    where, but only for a single sample: in a batch its padding is not cut off."""
    mask = arguments["encoder_attention_mask"]
    if len(mask) > 1:
        return -1
    return others - arguments["image_embeds"].shape[1] - int(mask.sum())


def no_given_frames(arguments: Arguments, config: Any) -> int:
    return 0


def first_frame(arguments: Arguments, config: Any) -> int:
    """The reference picture comes first."""
    return 1


def replaced_frame(arguments: Arguments, config: Any) -> int:
    """HunyuanVideo's image-to-video models may keep the given first frame as it is."""
    return int(config.image_condition_type == "token_replace")


def vace_references(arguments: Arguments, config: Any) -> int:
    """VACE's reference pictures come first. They are the frames of its control
    ``[B, 2 C + mask, T, H, W]`` in which all but the first C channels are exactly zero; in other
    frames these hold an encoded picture, which never is."""
    control = arguments.get("control_hidden_states")
    if control is None:
        return 0
    return _leading((control[:, config.in_channels :] == 0).all(dim=(0, 1, 3, 4)))


def conditioned_frames(arguments: Arguments, config: Any) -> int:
    """Cosmos gets a mask ``[B, 1, T, H, W]`` of the given frames."""
    mask = arguments.get("condition_mask")
    return 0 if mask is None else _leading((mask == 1).all(dim=(0, 1, 3, 4)))


def marked_frames(arguments: Arguments, config: Any) -> int:
    """Kandinsky's latent ``[B, T, H, W, C]`` marks given frames in its last channel."""
    if not config.visual_cond:
        return 0
    return _leading((arguments["hidden_states"][..., -1] == 1).all(dim=(0, 2, 3)))


class Family(NamedTuple):
    """What is known of one class of transformers.

    ``layers``: patterns for the names of its self-attention modules. ``processors``: the attention
    processor classes that compute plain attention there. ``grid``: the video's token grid from the
    arguments of ``forward`` and the config, or None if it can't be told. ``start``: how many of the
    sequence's other tokens come before the video. ``given``: how many leading frames are given to
    the model rather than generated. ``rising``: the last timestep of a model whose timesteps rise
    from 0; 0 if they fall, as most do. ``noise``: the timestep of the video among the arguments.
    """

    layers: tuple[str, ...]
    processors: tuple[str, ...]
    grid: Callable[[Arguments, Any], Grid | None] = latent_grid
    start: Callable[[Arguments, int], int] = video_first
    given: Callable[[Arguments, Any], int] = no_given_frames
    rising: float = 0.0
    noise: Callable[[Arguments], Any] = told_timestep


FAMILIES = {
    "WanTransformer3DModel": Family(("blocks.*.attn1",), ("WanAttnProcessor",)),
    "WanVACETransformer3DModel": Family(
        ("blocks.*.attn1", "vace_blocks.*.attn1"), ("WanAttnProcessor",), given=vace_references
    ),
    "WanAnimateTransformer3DModel": Family(
        ("blocks.*.attn1",), ("WanAttnProcessor",), given=first_frame
    ),
    "SkyReelsV2Transformer3DModel": Family(("blocks.*.attn1",), ("SkyReelsV2AttnProcessor",)),
    "HunyuanVideoTransformer3DModel": Family(
        ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        ("HunyuanVideoAttnProcessor2_0",),
        given=replaced_frame,
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        ("transformer_blocks.*.attn",), ("HunyuanVideo15AttnProcessor2_0",)
    ),
    "LTXVideoTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",), ("LTXVideoAttnProcessor",), told_grid
    ),
    "LTX2VideoTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",),
        ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
        told_grid,
    ),
    "CogVideoXTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",),
        ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
        frames_first_grid,
        video_last,
    ),
    "MochiTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",), ("MochiAttnProcessor2_0",), rising=1000.0
    ),
    "CosmosTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",), ("CosmosAttnProcessor2_0",), given=conditioned_frames
    ),
    "Kandinsky5Transformer3DModel": Family(
        ("visual_transformer_blocks.*.self_attention",),
        ("Kandinsky5AttnProcessor",),
        channels_last_grid,
        given=marked_frames,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Family(
        ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        ("HunyuanVideoAttnProcessor2_0",),
        start=video_between,
    ),
    "MotifVideoTransformer3DModel": Family(
        ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        ("MotifVideoAttnProcessor2_0",),
    ),
    "HeliosTransformer3DModel": Family(
        ("blocks.*.attn1",), ("HeliosAttnProcessor",), start=video_last
    ),
    "ChronoEditTransformer3DModel": Family(("blocks.*.attn1",), ("WanAttnProcessor",)),
    "ConsisIDTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",),
        ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
        frames_first_grid,
        video_last,
    ),
    "EasyAnimateTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",), ("EasyAnimateAttnProcessor2_0",), start=video_last
    ),
    "MiniMaxH3Transformer3DModel": Family(
        ("transformer_blocks.*.attn",),
        ("MiniMaxH3AttnProcessor",),
        packed_grid,
        video_last,
        rising=1.0,
        noise=packed_timestep,
    ),
    "AllegroTransformer3DModel": Family(
        ("transformer_blocks.*.attn1",), ("AllegroAttnProcessor2_0",)
    ),
}


#: Families of classes that users have registered.
_registered: dict[type, Family] = {}


def register_family(cls: type, like: type | str | Family) -> None:
    """Let ``enable`` treat transformers of the class ``cls`` like those of another class, or as a
    :class:`Family` describes.

    ``lite.register_family(MyTransformer, like="WanTransformer3DModel")`` says that the names and
    processors of its self-attention, the arguments of ``forward`` and the places of the video
    tokens are the same as in that class. A subclass of a known class that doesn't override
    ``forward`` needs no registration. ValueError lists the known classes.
    """
    if isinstance(like, Family):
        _registered[cls] = like
        return
    name = like if isinstance(like, str) else like.__name__
    if name not in FAMILIES:
        raise ValueError(
            f"LiteAttention: no family {name!r}; like is a Family or one of {', '.join(FAMILIES)}."
        )
    _registered[cls] = FAMILIES[name]


def family_of(transformer: nn.Module) -> Family | str:
    """What is known of a transformer, or why it stays dense."""
    cls: Any = type(transformer)
    for base in cls.__mro__:
        family = _registered.get(base)
        if family is None and base.__module__.startswith("diffusers."):
            family = FAMILIES.get(base.__name__)
        if family is None:
            continue
        if base is cls or cls.forward is base.forward:
            return family
        return (
            f"{cls.__name__} has a forward of its own: if its self-attention is that of "
            f"{base.__name__}, lite.register_family({cls.__name__}, like={base.__name__!r}) says so"
        )
    return f"{cls.__name__} is not supported yet"


def self_attention(transformer: nn.Module, family: Family) -> list[str]:
    """Names of the modules that do self-attention over the video."""
    return [
        name
        for name, _ in transformer.named_modules()
        if any(fnmatchcase(name, pattern) for pattern in family.layers)
    ]


def video_tokens(
    family: Family, arguments: Arguments, grid: Grid | None, length: int
) -> VideoTokens | str | None:
    """Where the video lies in a sequence of ``length`` tokens, or why that is unknown.

    None: all tokens are video, on an unknown grid.
    """
    if grid is None:
        return None
    others = length - VideoTokens(grid).stop
    start = family.start(arguments, others)
    return VideoTokens(grid, start) if 0 <= start <= others else NOT_FOUND


def given_tokens(
    family: Family, arguments: Arguments, config: Any, grid: Grid | None
) -> TokenRanges:
    """Video tokens that are given to the model rather than generated; they are never skipped."""
    timestep = torch.as_tensor(arguments["timestep"])
    frame = None if grid is None else grid[1] * grid[2]
    levels = timestep.flatten(1) if timestep.dim() > 1 else None
    if levels is not None and frame is not None and grid is not None and levels.shape[1] == grid[0]:
        levels = levels.repeat_interleave(frame, dim=1)
    ranges = () if levels is None else less_noisy(levels)
    leading = family.given(arguments, config)
    return ((0, leading * frame), *ranges) if leading and frame is not None else ranges


def less_noisy(levels: Tensor) -> TokenRanges:
    """Ranges of tokens that are less noisy than the others, from noise levels ``[B, L]``.

    These are the given frames in image-to-video models that have a noise level per token or frame.
    """
    clean = [False, *(levels < levels.max()).any(0).tolist(), False]
    edges = [i for i in range(len(clean) - 1) if clean[i] != clean[i + 1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _cut(sizes: Any, config: Any) -> Grid:
    """The token grid of a latent with ``sizes`` frames, rows and columns."""
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    frames, rows, columns = (n // p for n, p in zip(sizes, patch, strict=True))
    return frames, rows, columns


def _leading(flags: Tensor) -> int:
    """How many of ``flags [T]`` bool are true before the first that is false."""
    return int(flags.long().cumprod(0).sum())
