"""The demo's stand-in for a video VAE: an exact, weight-free pixel shuffle.

A video [B, 3, F, H, W] in [-1, 1] becomes a latent [B, 16, F, H/2, W/2]:

    channels 0..11   the RGB values of each 2x2 pixel block, channel = (rgb * 2 + row) * 2 + column
    channels 12..15  the luminance of the same four pixels (redundant; ignored by `decode`)

Wan's latents have 16 channels; the luminance fills the last four. Nothing is compressed in time,
so latent frames are video frames, and decode(encode(x)) == x bit for bit.
"""

from __future__ import annotations

import torch

LATENT_CHANNELS = 16
RGB_CHANNELS = 12
PIXELS_PER_LATENT = 2
LUMA = (0.299, 0.587, 0.114)


def fold_blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, C, F, H, W] -> [B, 4 C, F, H/2, W/2]; F.pixel_unshuffle for videos."""
    b, c, f, h, w = x.shape
    if h % 2 or w % 2:
        raise ValueError(f"video height and width must be even, got {h} x {w}")
    x = x.reshape(b, c, f, h // 2, 2, w // 2, 2).permute(0, 1, 4, 6, 2, 3, 5)
    return x.reshape(b, 4 * c, f, h // 2, w // 2)


def unfold_blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, 4 C, F, H/2, W/2] -> [B, C, F, H, W]; the inverse of `fold_blocks`."""
    b, c, f, h, w = x.shape
    x = x.reshape(b, c // 4, 2, 2, f, h, w).permute(0, 1, 4, 5, 2, 6, 3)
    return x.reshape(b, c // 4, f, 2 * h, 2 * w)


def encode(video: torch.Tensor) -> torch.Tensor:
    """Video [B, 3, F, H, W] in [-1, 1] -> latent [B, 16, F, H/2, W/2]."""
    weights = torch.tensor(LUMA, dtype=video.dtype, device=video.device).view(1, 3, 1, 1, 1)
    luminance = (video * weights).sum(1, keepdim=True)
    return torch.cat([fold_blocks(video), fold_blocks(luminance)], 1)


def decode(latent: torch.Tensor) -> torch.Tensor:
    """Latent [B, 16, F, h, w] -> video [B, 3, F, 2h, 2w], nominally in [-1, 1], not clamped."""
    if latent.ndim != 5 or latent.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"expected a latent [B, 16, F, h, w], got {list(latent.shape)}")
    return unfold_blocks(latent[:, :RGB_CHANNELS])
