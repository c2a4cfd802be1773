"""The demo's stand-in for a video VAE: a fixed linear codec, nothing of it learned.

A video [B, 3, F, H, W] in [-1, 1] becomes a latent [B, 16, F, H/4, W/4]. Every block of 4 x 4
pixels is turned into luma and chroma (Y, Cb, Cr as in BT.601), each of these into its cosine
transform, and the 16 lowest frequencies are kept, as JPEG keeps more of luma than of chroma:

    channels 0..9    luma, the 10 with vertical + horizontal frequency of at most 3
    channels 10..12  Cb: mean, horizontal and vertical slope
    channels 13..15  Cr: the same

Channels are shifted and scaled to what a flow model learns well: zero mean, and deviations that
fall with frequency half as steeply (in decibels) as those of the pictures do. Nothing is compressed
in time: latent frames are video frames. What decoding drew, encoding reads back exactly.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 4
LUMA, CHROMA = 3, 1  # the highest vertical + horizontal frequency that is kept
TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
#: Of the coefficients of training videos.
MEAN = (-2.3,) + (0.0,) * 15
# fmt: off
DEVIATION = (
    1.1, 0.165, 0.165, 0.055, 0.05, 0.055, 0.03, 0.03, 0.03, 0.03,
    0.65, 0.095, 0.095, 0.65, 0.095, 0.095,
)
# fmt: on


def frequencies(limit: int) -> list[tuple[int, int]]:
    """(vertical, horizontal) with a sum of at most `limit`, lowest first."""
    side = range(PIXELS_PER_LATENT)
    pairs = [(v, h) for v in side for h in side if v + h <= limit]
    return sorted(pairs, key=lambda pair: (sum(pair), pair))


@lru_cache(maxsize=1)
def analysis() -> torch.Tensor:
    """[16, 3, 4, 4]: every channel's weights of the RGB values of a block, float64."""
    n = PIXELS_PER_LATENT
    places = (torch.arange(n, dtype=torch.float64) + 0.5) * math.pi / n
    cosines = torch.stack([(f * places).cos() for f in range(n)])
    cosines = cosines / cosines.norm(dim=1, keepdim=True)
    rows = torch.tensor(TO_YCC, dtype=torch.float64)
    kept = [(plane, *f) for plane in range(3) for f in frequencies(CHROMA if plane else LUMA)]
    return torch.stack(
        [torch.einsum("c,y,x->cyx", rows[plane], cosines[v], cosines[h]) for plane, v, h in kept]
    )


@lru_cache(maxsize=1)
def synthesis() -> torch.Tensor:
    """[16, 3, 4, 4]: what each channel adds to the RGB values of a block, float64."""
    n = PIXELS_PER_LATENT
    return torch.linalg.pinv(analysis().flatten(1)).T.reshape(LATENT_CHANNELS, 3, n, n)


@lru_cache(maxsize=1)
def normalisation() -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and divisor of the channels, [16] float64."""
    deviation = torch.tensor(DEVIATION, dtype=torch.float64)
    return torch.tensor(MEAN, dtype=torch.float64), (deviation * deviation[0]).sqrt()


def encode(video: torch.Tensor) -> torch.Tensor:
    """Video [B, 3, F, H, W] in [-1, 1] -> latent [B, 16, F, H/4, W/4]."""
    b, c, f, h, w = video.shape
    n = PIXELS_PER_LATENT
    if h % n or w % n:
        raise ValueError(f"video height and width must be multiples of {n}, got {h} x {w}")
    shift, divisor = (x.to(video).view(-1, 1, 1, 1) for x in normalisation())
    blocks = video.reshape(b, c, f, h // n, n, w // n, n)
    latent = torch.einsum("bcfiyjx,kcyx->bkfij", blocks, analysis().to(video))
    return (latent - shift) / divisor


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Latent [B, 16, F, h, w] -> video [B, 3, F, 4h, 4w], nominally in [-1, 1], not clamped."""
    if latent.ndim != 5 or latent.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"expected a latent [B, 16, F, h, w], got {list(latent.shape)}")
    b, _, f, h, w = latent.shape
    n = PIXELS_PER_LATENT
    shift, divisor = (x.to(latent).view(-1, 1, 1, 1) for x in normalisation())
    blocks = torch.einsum("bkfij,kcyx->bcfiyjx", latent * divisor + shift, synthesis().to(latent))
    return blocks.reshape(b, 3, f, n * h, n * w)
