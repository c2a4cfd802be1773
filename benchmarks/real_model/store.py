"""Videos and figures of every run, stored as soon as they are made: a restart loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

DENSE = "dense"


class Job(NamedTuple):
    """One video. ``variant``: dense, another attention's name, or a preset's."""

    variant: str
    prompt: str
    seed: int

    @property
    def key(self) -> str:
        """A name for files."""
        prompt = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        return f"{self.variant.lower().replace(' ', '_')}-{prompt}-{self.seed}"


class Made(NamedTuple):
    """What a host made: ``video [N, H, W, 3]`` uint8, and figures of the run."""

    video: Tensor
    figures: dict[str, Any]


class Store:
    """A folder of runs. ``about``: what they have in common; other choices need another folder."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        path = folder / "about.json"
        if not path.exists():
            _write(path, json.dumps(about, indent=1).encode())
        elif (known := json.loads(path.read_text())) != json.loads(json.dumps(about)):
            raise ValueError(
                f"{folder} holds runs of {known}, not of {about}: choose another --out"
            )

    def has(self, job: Job) -> bool:
        return self._path(job, "json").exists()

    def keep(self, job: Job, made: Made) -> None:
        """Store a run, its figures last: where they exist, the video is complete."""
        partial = self._path(job, "part")
        with open(partial, "wb") as file:
            np.save(file, made.video.numpy())
        os.replace(partial, self._path(job, "npy"))
        _write(self._path(job, "json"), json.dumps(job._asdict() | made.figures, indent=1).encode())

    def video(self, job: Job) -> Tensor:
        """``[N, H, W, 3]`` float 0..1."""
        return torch.from_numpy(np.load(self._path(job, "npy"))).float() / 255

    def figures(self, job: Job) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._path(job, "json").read_text())
        return found

    def _path(self, job: Job, suffix: str) -> Path:
        return self.folder / "runs" / f"{job.key}.{suffix}"


def jobs(variants: Iterable[str], prompts: Iterable[str], seeds: Iterable[int]) -> list[Job]:
    """All variants of one video before the next one's, so that an early end leaves whole rows."""
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    names = list(variants)
    return [Job(variant, prompt, seed) for prompt, seed in pairs for variant in names]


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".part")
    partial.write_bytes(data)
    os.replace(partial, path)
