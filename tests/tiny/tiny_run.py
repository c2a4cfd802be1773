"""A run of five steps, and attention whose far tiles are negligible."""

import math

import numpy as np
import torch

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
SCALE = 32**-0.5


def local_qkv(seed: int, batch: int = 1, tokens: int = 250):
    """Queries that look mostly at keys nearby, so that far tiles are negligible."""
    generator = torch.Generator().manual_seed(seed)
    angle = np.linspace(0, math.pi, tokens)[:, None] * np.arange(1, 17)
    # Not torch's: its first cosine in a process is sometimes less exact (seen with MKL).
    place = torch.from_numpy(np.concatenate([np.cos(angle), np.sin(angle)], -1)).float()
    noise = torch.randn(3, batch, 2, tokens, 32, generator=generator)
    return 4 * place + noise[0], 4 * place + noise[1], noise[2]
