"""The demo's weights as a folder that diffusers loads as a Wan pipeline.

Its text encoder gives the demo's own text tokens for prompts of words with their slots, such as
``red.0 circle.1``; its VAE is tiny and random.
"""

from pathlib import Path

import torch

from demo.model import SHIFT, TEXT_TABLE, WEIGHTS, load_diffusers_model
from demo.text import SLOTS, TEXT_DIM, WORDS, load_table, parse_prompt

#: What the pipeline has to be called with: the demo's number of text tokens, no guidance.
CALL = {"max_sequence_length": SLOTS, "guidance_scale": 1.0}


def words_with_slots(prompt):
    """A prompt of the demo, for this pipeline; the empty one gives the null text."""
    return " ".join(f"{WORDS[word]}.{slot}" for slot, word in enumerate(parse_prompt(prompt)))


def save_pipeline(folder: Path):
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    tokenizer, encoder = _text()
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        transformer=load_diffusers_model(WEIGHTS),
        vae=_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    ).save_pretrained(folder)


def _text():
    """One token a word and slot; a layer that adds nothing, and a norm of vectors that have it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    names = ["<pad>", *(f"{word}.{slot}" for word in WORDS for slot in range(SLOTS))]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(names), **sizes)).eval()
    table = load_table(TEXT_TABLE)
    words, slots = table["words"].float(), table["slots"].float()
    pairs = (words[:, None] + slots).flatten(0, 1) * 2**-0.5
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if not name.endswith(("norm.weight", "embed_tokens.weight", "shared.weight")):
                parameter.zero_()
        encoder.shared.weight.copy_(torch.cat([torch.zeros(1, TEXT_DIM), pairs]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>"), encoder


def _vae():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        scale_factor_spatial=2,
        scale_factor_temporal=1,
    ).eval()
