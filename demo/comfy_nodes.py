"""ComfyUI nodes of the demo alone: text, empty latent and decode for the shipped small model.

They stand in for the text encoder and the VAE that a real Wan model has. Between them the graph is
ComfyUI's own: Load Diffusion Model, ModelSamplingSD3 (shift 3), KSampler.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_management
import torch
from comfy_api.latest import ComfyExtension, io

from .latents import LATENT_CHANNELS, PIXELS_PER_LATENT, decode
from .model import TEXT_TABLE
from .text import EXAMPLE, describe_vocabulary, embed_prompts, load_table

CATEGORY = "LiteAttention/demo"
PIXELS_PER_TOKEN = 2 * PIXELS_PER_LATENT


class LiteAttentionDemoText(io.ComfyNode):
    """Prompt of the demo's small vocabulary -> conditioning of 8 tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionDemoText",
            display_name="LiteAttention Demo Text",
            category=CATEGORY,
            description="Text for the small demo model. It knows " + describe_vocabulary(),
            inputs=[
                io.String.Input(
                    "prompt",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip="One or two clauses COLOUR SHAPE moving DIRECTION, joined by 'and'. "
                    "Leave empty for the negative prompt. It knows " + describe_vocabulary(),
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Goes to KSampler's positive or negative.")],
        )

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
        return io.NodeOutput([[embed_prompts([prompt], load_table(TEXT_TABLE)), {}]])


class LiteAttentionDemoLatent(io.ComfyNode):
    """An empty latent of the demo's size: 16 channels, half the pixels, one frame per frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def size(name: str) -> io.Int.Input:
            return io.Int.Input(
                name,
                default=64,
                min=16,
                max=256,
                step=PIXELS_PER_TOKEN,
                tooltip=f"Video {name} in pixels. The model was trained at 32 to 64.",
            )

        return io.Schema(
            node_id="LiteAttentionDemoLatent",
            display_name="LiteAttention Demo Latent",
            category=CATEGORY,
            description="An empty latent video for the small demo model. "
            "Attention sees frames x (width / 4) x (height / 4) tokens: 4096 with the defaults.",
            inputs=[
                size("width"),
                size("height"),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=1,
                    max=64,
                    tooltip="Length of the video. The model was trained at 8 and 16 frames.",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=16, tooltip="Videos drawn at the same time."
                ),
            ],
            outputs=[io.Latent.Output(tooltip="Goes to KSampler's latent_image.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        shape = (
            batch_size,
            LATENT_CHANNELS,
            frames,
            height // PIXELS_PER_LATENT,
            width // PIXELS_PER_LATENT,
        )
        device = comfy.model_management.intermediate_device()
        return io.NodeOutput({"samples": torch.zeros(shape, device=device)})


class LiteAttentionDemoDecode(io.ComfyNode):
    """Latent -> frames, by the exact pixel shuffle of `demo.latents`."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LiteAttentionDemoDecode",
            display_name="LiteAttention Demo Decode",
            category=CATEGORY,
            description="Turns the small demo model's latent into frames: a pixel shuffle, no VAE.",
            inputs=[
                io.Latent.Input("samples", tooltip="What KSampler returns."),
                io.Int.Input(
                    "upscale",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="Every pixel becomes a square of this many pixels. 1 leaves the "
                    "video at its true size.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="All frames of all videos, one after the other.")],
        )

    @classmethod
    def execute(cls, samples: dict, upscale: int) -> io.NodeOutput:
        # KSampler hands out latents in Wan's VAE scale; the demo model lives in the model's scale.
        latent = comfy.latent_formats.Wan21().process_in(samples["samples"].float())
        frames = (decode(latent).clamp(-1, 1) + 1) / 2  # [B, 3, F, H, W]
        frames = frames.permute(0, 2, 3, 4, 1).flatten(0, 1)  # [B F, H, W, 3]
        frames = frames.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2)
        return io.NodeOutput(frames.contiguous())


class LiteAttentionDemoExtension(ComfyExtension):
    """The three nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LiteAttentionDemoText, LiteAttentionDemoLatent, LiteAttentionDemoDecode]
