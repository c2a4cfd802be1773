"""Key names: diffusers' WanTransformer3DModel <-> original Wan (what ComfyUI loads).

Both directions are renames only; no tensor changes shape or value.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

# (diffusers, original). Longer names come before names that they contain.
RENAMES = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
)
BLOCK_RENAMES = (
    ("attn1.to_q", "self_attn.q"),
    ("attn1.to_k", "self_attn.k"),
    ("attn1.to_v", "self_attn.v"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn1.norm_q", "self_attn.norm_q"),
    ("attn1.norm_k", "self_attn.norm_k"),
    ("attn2.to_q", "cross_attn.q"),
    ("attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "cross_attn.v"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.norm_q", "cross_attn.norm_q"),
    ("attn2.norm_k", "cross_attn.norm_k"),
    ("norm2", "norm3"),  # diffusers numbers the norms in order of use, Wan does not
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("scale_shift_table", "modulation"),
)


def rename(key: str, table: tuple[tuple[str, str], ...]) -> str:
    """Replace the module path at the start of `key` by its partner in `table`."""
    for old, new in table:
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return key


def convert_key(key: str, reverse: bool = False) -> str:
    """One diffusers key -> original key; `reverse` for the other way."""

    def swap(table: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        return tuple((new, old) for old, new in table) if reverse else table

    if key.startswith("blocks."):
        _, index, rest = key.split(".", 2)
        return f"blocks.{index}.{rename(rest, swap(BLOCK_RENAMES))}"
    # The table of the last layer has the same name as those of the blocks.
    return rename(key, swap((*RENAMES, ("scale_shift_table", "head.modulation"))))


def to_original(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers state dict -> original Wan state dict."""
    return {convert_key(key): value for key, value in state.items()}


def to_diffusers(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Original Wan state dict -> diffusers state dict."""
    return {convert_key(key, reverse=True): value for key, value in state.items()}
