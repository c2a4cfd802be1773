"""The shape of the demo model, and how to load it into diffusers.

The model is a Wan 2.1 text-to-video transformer in miniature: 2 heads x 128, 4 layers, about
4.8 M parameters. ComfyUI's own loader recognises the shipped file; diffusers gets the same weights
through `demo.convert`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .convert import to_diffusers
from .latents import LATENT_CHANNELS
from .text import TEXT_DIM

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights" / "liteattention_demo_wan.safetensors"
TEXT_TABLE = HERE / "weights" / "liteattention_demo_text.safetensors"

LAYERS, HEADS, HEAD_DIM = 4, 2, 128
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 512,
    "num_layers": LAYERS,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
SHIFT = 3.0  # of the noise schedule, in training and sampling
LATENT_SHAPE = (LATENT_CHANNELS, 16, 32, 32)  # the demo size: 16 frames of 64 px, 4096 tokens


def shift_sigma(sigma: torch.Tensor, shift: float = SHIFT) -> torch.Tensor:
    """Move noise levels in 0..1 towards 1: s -> shift s / (1 + (shift - 1) s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def count_tokens(latent_shape: tuple[int, ...]) -> int:
    """Tokens of a latent [..., F, h, w] under the 1 x 2 x 2 patch."""
    frames, height, width = latent_shape[-3:]
    return frames * (height // 2) * (width // 2)


def build_model(seed: int | None = None):
    """A WanTransformer3DModel with random float32 weights, drawn from `seed` if given."""
    from diffusers import WanTransformer3DModel

    if seed is None:
        return WanTransformer3DModel(**TRANSFORMER_CONFIG)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**TRANSFORMER_CONFIG)


def load_diffusers_model(path: str | Path = WEIGHTS):
    """The shipped (or another) original-key Wan file as a float32 diffusers model in eval mode."""
    from safetensors.torch import load_file

    model = build_model()
    model.load_state_dict(to_diffusers(load_file(str(path))))
    return model.eval().requires_grad_(False)


def sharpen_start(model, gain: float, locality: float) -> None:
    """The declared shortcuts to sharp attention, applied once before training; see the model card.

    `gain` sets the gains of q and k norms of self-attention (a fresh model has 1), which scales the
    logits by gain**2. `locality` writes equal q and k biases into the fast half of the rotary pairs
    of head 0, so that this head starts out preferring near tokens; 0 leaves the biases alone.
    """
    pairs = HEAD_DIM // 2
    axis = HEAD_DIM // 6  # rotary pairs of height and of width; time has the rest
    fast = torch.zeros(pairs)
    for start in (0, pairs - 2 * axis, pairs - axis):
        fast[start : start + 8] = 1
    bias = torch.zeros(HEADS * HEAD_DIM)
    bias[:HEAD_DIM] = locality * fast.repeat_interleave(2)
    with torch.no_grad():
        for block in model.blocks:
            block.attn1.norm_q.weight.fill_(gain)
            block.attn1.norm_k.weight.fill_(gain)
            if locality:
                block.attn1.to_q.bias.copy_(bias)
                block.attn1.to_k.bias.copy_(bias)
