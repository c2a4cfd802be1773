"""What each preset computes, loses and keeps, on the demo model: ``python -m benchmarks.presets``.

Samples a few prompts with one seed each, dense and with every preset, in this process through
diffusers' pipeline. PSNR is that of the pixels to the dense video of the same seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor
from tqdm import tqdm

import comfyui_liteattention as lite
from comfyui_liteattention.presets import PRESETS
from demo.latents import decode
from demo.model import TEXT_TABLE, load_diffusers_model
from demo.text import embed_prompts, load_table

CASES = (
    ("red circle moving right and blue square moving up", 7),
    ("green triangle moving down", 11),
    ("white cross moving down-left and yellow circle moving left", 23),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.presets", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rows = measure(options.steps)
    print(f"{'preset':<10} {'seed':>4} {'computed':>9} {'lost mass':>10} {'PSNR dB':>8} {'sec':>6}")
    for row in rows:
        print(
            f"{row['preset']:<10} {row['seed']:>4} {row['computed_fraction']:>9.1%} "
            f"{row['lost_mass_mean']:>10.3%} {row['psnr_db']:>8.1f} {row['seconds']:>6.1f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def measure(steps: int) -> list[dict[str, Any]]:
    """A row for every preset and case."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe: Any = WanPipeline(None, None, None, scheduler, load_diffusers_model())
    pipe.set_progress_bar_config(disable=True)
    rows = []
    with tqdm(total=len(CASES) * (1 + len(PRESETS))) as bar:
        for prompt, seed in CASES:
            dense, _ = sample(pipe, prompt, seed, steps)
            bar.update()
            for name in PRESETS:
                with lite.enabled(pipe, preset=name) as handle:
                    video, seconds = sample(pipe, prompt, seed, steps)
                    report = handle.report()
                    assert report is not None
                rows.append(
                    {
                        "preset": name,
                        "seed": seed,
                        "computed_fraction": report.computed_fraction,
                        "lost_mass_mean": report.lost_mass_mean,
                        "psnr_db": psnr(dense, video),
                        "seconds": seconds,
                    }
                )
                bar.update()
    return rows


def sample(pipe: Any, prompt: str, seed: int, steps: int) -> tuple[Tensor, float]:
    """``[1, 3, F, H, W]`` in 0..1, and the seconds of sampling."""
    text, empty = embed_prompts([prompt, ""], load_table(TEXT_TABLE)).split(1)
    started = time.perf_counter()
    latent = pipe(
        prompt_embeds=text,
        negative_prompt_embeds=empty,
        height=256,
        width=256,
        num_frames=61,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).frames
    return (decode(latent).clamp(-1, 1) + 1) / 2, time.perf_counter() - started


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, for values in 0..1; equal tensors give 100."""
    mse = float((a - b).square().mean())
    return 100.0 if mse == 0 else -10 * torch.tensor(mse).log10().item()


if __name__ == "__main__":
    main()
