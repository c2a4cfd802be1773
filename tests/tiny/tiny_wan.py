"""Tiny Wan and LTX-Video transformers whose attention is local, and what hooks are left on one."""

import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel


def sharpen(model, channels=slice(None), gain=4.0, bias=2.0):
    """Make queries and keys differ by their position only, so that distant tokens don't matter.

    ``channels`` of each head to do this in; the others are zero.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("attn1"):
                heads = module.heads
                for norm in (module.norm_q, module.norm_k):
                    norm.weight.zero_().view(heads, -1)[:, channels] = gain
                for linear in (module.to_q, module.to_k):
                    linear.bias.fill_(bias)
    return model.eval()


#: Of the 12 + 10 + 10 channels of a head that turn with frame, row and column: those that turn by
#: about 1/6 rad a token. Faster ones complete a turn within the video, so that distant tokens would
#: look close. With a turn longer than the video, attention between compact tiles, as the default
#: order makes them, decreases with their distance.
LOCAL = [2, 3, 14, 15, 24, 25]


def make_wan(seed=0, heads=2, gain=12.0, channels=4):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    return sharpen(model, LOCAL, gain)


def make_ltx():
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=32,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=16,
    )
    return sharpen(model)


def hooks_left(model):
    registries = [m._diffusers_hook for m in model.modules() if hasattr(m, "_diffusers_hook")]
    return [
        *model._forward_hooks,
        *model._forward_pre_hooks,
        *(name for registry in registries for name in registry.hooks),
        *(name for name in vars(model) if "lite" in name),
    ]
