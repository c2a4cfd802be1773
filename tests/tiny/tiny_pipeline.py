"""A real WanPipeline with a tiny transformer whose attention is local; calls without a pipeline."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny_wan import make_wan

TOKENS = 320  # 5 latent frames of 8 x 8 tokens: a tile of 64 is a frame
BOLD = {"threshold": -1.0, "ramp": 0.0, "min_tokens": 0, "audit": 0, "never_slower": False}


def make_pipe(seed=0, **parts):
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=make_wan(seed),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, seed=0, steps=4, **options):
    """One video; ``seed`` stands for the prompt and the noise."""
    generator = torch.Generator().manual_seed(seed)
    text, negative = torch.randn(2, 1, 6, 16, generator=generator)
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        height=128,
        width=128,
        num_frames=17,
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
        generator=generator,
        **options,
    ).frames


@torch.no_grad()
def call(model, text, timestep, seed=0, context=None, **fields):
    """One call of a Wan transformer; ``seed`` stands for the video and for the noise in it."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 1, 4, 5, 16, 16, generator=generator)
    latent = torch.lerp(clean, noise, timestep / 1000)
    timestep = torch.as_tensor(timestep, dtype=torch.float32)
    timestep = timestep if timestep.dim() else timestep.expand(len(text))
    arguments = (latent.expand(len(text), -1, -1, -1, -1), timestep, text)
    if context is None:
        return model(*arguments, return_dict=False)[0]
    with model.cache_context(context, **fields):
        return model(*arguments, return_dict=False)[0]


def texts(count=2):
    return torch.randn(count, 1, 6, 16, generator=torch.Generator().manual_seed(5)).unbind()
