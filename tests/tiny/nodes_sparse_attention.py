"""ComfyUI's *Model Sparse Attention* (0.36 and newer) as far as other nodes meet it: where it hooks
in, what it takes, and to whom it leaves the rest.

Written down from ``comfy_extras/nodes_sparse_attention.py`` at 01dafad3. Its kernels are for cards;
this attends densely and notes what it took. The name of this file is that of its module, by which a
report knows it.
"""

from functools import partial
from unittest.mock import patch as replaced

import torch
from comfy_case import NEWER, version
from torch.nn.functional import scaled_dot_product_attention

SLOT = "optimized_attention_override"


class SparseAttnPatch:
    """``taken``: attention calls that it did, each conditioning of a batch for itself."""

    def __init__(self, model, start_percent=0.2, min_tokens=12288, dense_blocks=()):
        sampling = model.get_model_object("model_sampling")
        self.sigma_start = float(sampling.percent_to_sigma(start_percent))
        self.min_tokens = min_tokens
        self.dense_blocks = set(dense_blocks)
        self.installed = set()
        self.taken = 0

    def declines(self, options, tokens, block):
        early = float(options["sigmas"][0]) > self.sigma_start
        return early or tokens < self.min_tokens or block in self.dense_blocks


def make_attention_override(patch, previous):
    def override(func, q, k, v, heads, mask=None, **kwargs):
        options = kwargs.get("transformer_options") or {}
        split, joined = kwargs.get("skip_reshape"), not kwargs.get("skip_output_reshape")
        tokens = q.shape[2] if split else q.shape[1]
        other = mask is not None or not q.shape == k.shape == v.shape
        if other or patch.declines(options, tokens, options.get("block_index")):
            ask = func if previous is None else partial(previous, func)
            return ask(q, k, v, heads, mask=mask, **kwargs)
        patch.taken += len(q)
        if not split:
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2) if joined else out

    return override


def install_override(patch, options):
    """On top of whatever is there, unless it is one of its own: when the node is executed, and
    again before each evaluation of a run."""
    if options.get(SLOT) not in patch.installed:
        override = make_attention_override(patch, options.get(SLOT))
        patch.installed.add(override)
        options[SLOT] = override


def make_h3_block_patch(block, index, patch):
    """MiniMax H3: a block whose attention it takes runs with another one in its place, which asks
    no override. Newer blocks take that as an argument; here it is put there for as long."""

    class Attention(torch.nn.Module):
        def forward(self, x, rope_freqs=None, transformer_options=None):
            patch.taken += 1
            return own(x, rope_freqs=rope_freqs, transformer_options={})

    own, instead = block.attn, Attention()

    def block_patch(args, extra):
        options = args["transformer_options"]
        options["block_index"] = index  # as newer models do
        if patch.declines(options, len(args["img"]), index):
            return extra["original_block"](args)
        with replaced.dict(block._modules, attn=instead):
            return extra["original_block"](args)

    return block_patch


def apply_block_sparse_attention(model, **options):
    """A clone of a MODEL with it, and the patch."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    patch, clone = SparseAttnPatch(model, **options), model.clone()
    install_override(patch, clone.model_options["transformer_options"])

    def prepare(patcher, timestep, model_options):
        install_override(patch, model_options["transformer_options"])

    def predict(executor, x, timestep, model_options, seed):
        install_override(patch, model_options["transformer_options"])
        return executor(x, timestep, model_options, seed)

    if version() >= NEWER:
        clone.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "block_sparse_attention", prepare)
    else:  # tells its callbacks no options: as late as that
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "block_sparse_attention", predict)
    diffusion_model = model.get_model_object("diffusion_model")
    if type(diffusion_model).__name__ == "MiniMaxH3Model":
        for i, block in enumerate(diffusion_model.blocks):
            replacement = make_h3_block_patch(block, i, patch)
            clone.set_model_patch_replace(replacement, "dit", "double_block", i)
    return clone, patch
