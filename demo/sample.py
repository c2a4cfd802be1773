"""Draw videos with the demo model under diffusers: Euler steps of the flow, with guidance.

python -m demo.sample --prompt "red circle moving right" --out red.gif
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .latents import LATENT_CHANNELS, PIXELS_PER_LATENT, decode
from .model import LATENT_SHAPE, SHIFT, TEXT_TABLE, WEIGHTS, load_diffusers_model, shift_sigma
from .text import EXAMPLE, embed_prompts, load_table


@dataclass(frozen=True)
class SampleConfig:
    """One sampling run. `shape` is the latent's [C, F, h, w]; video pixels are 2h x 2w."""

    prompt: str = EXAMPLE
    seed: int = 0
    steps: int = 20
    guidance: float = 2.5
    shift: float = SHIFT
    shape: tuple[int, ...] = LATENT_SHAPE


def sigma_schedule(steps: int, shift: float = SHIFT) -> torch.Tensor:
    """Noise levels [steps + 1], from 1 to 0."""
    return shift_sigma(torch.linspace(1, 0, steps + 1), shift)


def guided_velocity(
    model, latent: torch.Tensor, sigma: torch.Tensor, texts: torch.Tensor, guidance: float
) -> torch.Tensor:
    """Velocity noise - x0 at noise level `sigma`: uncond + guidance (cond - uncond).

    latent [1, 16, F, h, w]; texts [2, 8, 4096] = cond, uncond, run as one batch.
    """
    timestep = (1000 * sigma).expand(2)
    cond, uncond = model(latent.expand(2, -1, -1, -1, -1), timestep, texts, return_dict=False)[0]
    return (uncond + guidance * (cond - uncond))[None]


@torch.no_grad()
def sample(
    model,
    table: dict[str, torch.Tensor],
    config: SampleConfig,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Run all steps; returns the clean latent [1, 16, F, h, w] float32.

    `on_step(step, latent)` is called before each step with the noisy latent.
    """
    generator = torch.Generator().manual_seed(config.seed)
    latent = torch.randn((1, *config.shape), generator=generator)
    texts = embed_prompts([config.prompt, ""], table)
    sigmas = sigma_schedule(config.steps, config.shift)
    for step in range(config.steps):
        if on_step is not None:
            on_step(step, latent)
        velocity = guided_velocity(model, latent, sigmas[step], texts, config.guidance)
        latent = latent + (sigmas[step + 1] - sigmas[step]) * velocity
    return latent


def to_pixels(video: torch.Tensor) -> torch.Tensor:
    """Video [B, 3, F, H, W] in [-1, 1] -> uint8 frames [B, F, H, W, 3]."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)


def contact_sheet(videos: Sequence[torch.Tensor], columns: int = 8, zoom: int = 2):
    """Videos [1, 3, F, H, W] -> one PIL picture: a video per row, `columns` frames across."""
    from PIL import Image

    rows = []
    for video in videos:
        frames = to_pixels(video)[0]
        shown = frames[torch.linspace(0, len(frames) - 1, columns).round().long()]
        rows.append(torch.cat(list(shown), 1))
    sheet = torch.cat(rows, 0)
    size = (sheet.shape[1] * zoom, sheet.shape[0] * zoom)
    return Image.fromarray(sheet.numpy()).resize(size, Image.Resampling.NEAREST)


def save_gif(video: torch.Tensor, path: Path, zoom: int = 4, fps: int = 8) -> None:
    """Write a video [1, 3, F, H, W] as an endless GIF, pixels enlarged `zoom` times."""
    from PIL import Image

    frames = [Image.fromarray(frame.numpy()) for frame in to_pixels(video)[0]]
    size = (frames[0].width * zoom, frames[0].height * zoom)
    frames = [frame.resize(size, Image.Resampling.NEAREST) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", action="append", help="repeat for several; default one example")
    parser.add_argument("--out", type=Path, default=Path("demo_sample.png"), help=".png or .gif")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--pixels", type=int, default=64, help="height and width of the video")
    parser.add_argument("--frames", type=int, default=16)
    args = parser.parse_args()
    side = args.pixels // PIXELS_PER_LATENT
    model, table = load_diffusers_model(args.weights), load_table(TEXT_TABLE)
    videos = []
    for prompt in args.prompt or [EXAMPLE]:
        config = SampleConfig(
            prompt=prompt,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
            shape=(LATENT_CHANNELS, args.frames, side, side),
        )
        videos.append(decode(sample(model, table, config)))
    if args.out.suffix == ".gif":
        save_gif(torch.cat(videos, -1), args.out)
    else:
        contact_sheet(videos).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
