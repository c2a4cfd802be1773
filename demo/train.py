"""Train the demo model from nothing on the CPU: `python -m demo.train`.

Flow matching (target = noise - x0) on procedural videos; short sequences first, the demo size of
4096 tokens last. Data, noise and order depend on the seed and the step number alone, so that a run
can be resumed and repeated. The defaults are the run behind the shipped weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

from .convert import to_original
from .latents import encode
from .model import TEXT_TABLE, WEIGHTS, build_model, sharpen_start, shift_sigma
from .muon import Muon
from .text import INDEX, PAD, caption, embed, make_table
from .videos import draw_scene, render


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one video size."""

    steps: int
    batch: int  # videos per step
    frames: int
    pixels: int  # height and width
    two_shapes: float  # chance of a second shape
    rate: tuple[float, float] = (1.0, 1.0)  # share of the peak learning rates, start to end
    level: tuple[float, float] = (0.0, 1.0)  # mean and deviation of the noise level's logit


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Learning rates are peaks, scaled by each phase; the first steps warm up."""

    seed: int = 0
    phases: tuple[Phase, ...] = (
        Phase(560, 10, 8, 32, 0.25),
        Phase(65, 4, 8, 48, 0.4),
        Phase(75, 2, 8, 64, 0.5, (245 / 243.6, 170 / 243.6)),
        Phase(9, 1, 16, 64, 0.5, (170 / 243.6, 161 / 243.6)),
        Phase(160, 5, 4, 64, 0.5),
        Phase(50, 2, 8, 64, 0.5, (1.0, 0.6)),
        Phase(70, 1, 16, 64, 0.5, (0.6, 0.0)),
        # What is drawn where is decided at the highest noise levels, which come up rarely above.
        Phase(500, 4, 4, 64, 0.2, (1.0, 1.0), (1.0, 1.3)),
        Phase(150, 2, 8, 64, 0.3, (1.0, 0.7), (1.0, 1.3)),
        Phase(180, 1, 16, 64, 0.3, (0.7, 0.0), (0.8, 1.3)),
        Phase(450, 1, 16, 64, 0.4, (0.8, 0.0), (1.3, 1.2)),
    )
    gain: float = 1.7  # starting gains of the self-attention q and k norms
    locality: float = 0.75  # starting q and k bias of head 0 in its fast rotary pairs
    lr_muon: float = 3e-3
    lr_adam: float = 2e-3
    lr_gain: float = 3e-3
    lr_text: float = 2e-4  # its inputs are 4096 wide
    warmup: int = 40
    null_text: float = 0.1
    ema: float = 0.995
    clip: float = 1.0

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> tuple[Phase, int]:
        """The phase of this step, and the step's number inside it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise ValueError("step is beyond the end of the run")

    def rate(self, step: int) -> float:
        """Share of the peak learning rates at this step."""
        phase, inside = self.locate(step)
        start, end = phase.rate
        return min(1.0, (step + 1) / self.warmup, start + (end - start) * inside / phase.steps)


@dataclass(frozen=True)
class Batch:
    """What one step sees."""

    latent: torch.Tensor  # [B, 16, F, h, w] clean
    noise: torch.Tensor  # same shape
    sigma: torch.Tensor  # [B] noise level, 0..1
    text: torch.Tensor  # [B, 8, 4096]


def make_batch(config: TrainConfig, step: int, table: dict[str, torch.Tensor]) -> Batch:
    """The batch of this step; a function of the seed and the step number alone."""
    phase, _ = config.locate(step)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    scene = draw_scene(phase.batch, phase.pixels, phase.pixels, generator, phase.two_shapes)
    slots = caption(scene)
    dropped = torch.rand(phase.batch, generator=generator) < config.null_text
    slots = torch.where(dropped[:, None], INDEX[PAD], slots)
    latent = encode(render(scene, phase.frames, phase.pixels, phase.pixels))
    noise = torch.randn(latent.shape, generator=generator)
    # Stratified over the batch: the same logit-normal distribution with less variance per step.
    order = torch.arange(phase.batch) + torch.rand(phase.batch, generator=generator)
    mean, deviation = phase.level
    level = mean + deviation * torch.special.ndtri((order / phase.batch).clamp(1e-4, 1 - 1e-4))
    return Batch(latent, noise, shift_sigma(torch.sigmoid(level)), embed(slots, table))


def flow_loss(model, batch: Batch) -> torch.Tensor:
    """Mean squared error of the predicted velocity, noise - x0."""
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - sigma) * batch.latent + sigma * batch.noise
    velocity = model(noisy, 1000 * batch.sigma, batch.text, return_dict=False)[0]
    return functional.mse_loss(velocity, batch.noise - batch.latent)


def make_optimisers(model, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices, gains, text, rest = [], [], [], []
    for name, p in model.named_parameters():
        if name.startswith("blocks.") and p.ndim == 2:
            matrices.append(p)
        elif "attn1.norm_" in name:
            gains.append(p)
        elif name.endswith("text_embedder.linear_1.weight"):
            text.append(p)
        else:
            rest.append(p)
    adam = torch.optim.AdamW(
        [
            {"params": rest, "lr": config.lr_adam},
            {"params": gains, "lr": config.lr_gain},
            {"params": text, "lr": config.lr_text},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [Muon(matrices, lr=config.lr_muon), adam]


def set_rates(optimisers: list[torch.optim.Optimizer], share: float) -> None:
    """Scale every group's learning rate to `share` of its peak."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * share


@torch.no_grad()
def update_ema(ema: dict[str, torch.Tensor], model, step: int, limit: float) -> None:
    """Running average of the weights, faster at the start."""
    decay = min(limit, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


def train_step(model, optimisers, config: TrainConfig, step: int, table) -> float:
    """One optimiser step; returns the loss."""
    set_rates(optimisers, config.rate(step))
    loss = flow_loss(model, make_batch(config, step, table))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


def save_weights(state: dict[str, torch.Tensor], path: Path, config: TrainConfig) -> None:
    """Write diffusers weights as fp16 safetensors under original Wan keys."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "config": json.dumps({"transformer": {"text_dim": 4096}}),
        "training": json.dumps(asdict(config)),
    }
    state = {key: value.half().contiguous() for key, value in to_original(state).items()}
    save_file(state, str(path), metadata)


def write_checkpoint(path: Path, **contents) -> None:
    """Write to a neighbour first, so that an interrupted write never spoils the checkpoint."""
    fresh = path.with_suffix(".tmp")
    torch.save(contents, fresh)
    os.replace(fresh, path)


def train(config: TrainConfig, folder: Path, threads: int, save_every: float = 120.0) -> None:
    """Run (or resume) a training run; leaves checkpoint.pt, weights and log.json in `folder`."""
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, table = folder / "checkpoint.pt", make_table()
    model = build_model(config.seed)
    sharpen_start(model, config.gain, config.locality)
    optimisers = make_optimisers(model, config)
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    step, losses, seconds = 0, [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["config"] != json.dumps(asdict(config)):
            raise SystemExit(f"{checkpoint} belongs to other settings; choose another --out")
        model.load_state_dict(saved["model"])
        ema, step, losses, seconds = (saved[key] for key in ("ema", "step", "losses", "seconds"))
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)

    def save() -> None:
        write_checkpoint(
            checkpoint,
            config=json.dumps(asdict(config)),
            model=model.state_dict(),
            ema=ema,
            step=step,
            losses=losses,
            seconds=seconds,
            optimisers=[optimiser.state_dict() for optimiser in optimisers],
        )
        save_weights(ema, folder / WEIGHTS.name, config)
        log = {
            "config": asdict(config),
            "machine": f"{platform.machine()}, {threads} threads, torch {torch.__version__}",
            "steps": step,
            "seconds": round(seconds),
            "losses": [round(loss, 5) for loss in losses],
        }
        (folder / "training_log.json").write_text(json.dumps(log))

    bar = tqdm(total=config.total_steps, initial=step, mininterval=5)
    saved_at = clock = time.monotonic()
    while step < config.total_steps:
        losses.append(train_step(model, optimisers, config, step, table))
        update_ema(ema, model, step, config.ema)
        step += 1
        now = time.monotonic()
        seconds, clock = seconds + now - clock, now
        bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
        bar.update()
        if now - saved_at > save_every:
            save()
            saved_at = time.monotonic()
    save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_training"), help="output folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--install", action="store_true", help="put the weights into demo/weights")
    args = parser.parse_args()
    config = TrainConfig(seed=args.seed)
    train(config, args.out, args.threads)
    if args.install:
        from safetensors.torch import save_file

        save_file(make_table(), str(TEXT_TABLE))
        os.replace(args.out / WEIGHTS.name, WEIGHTS)


if __name__ == "__main__":
    main()
