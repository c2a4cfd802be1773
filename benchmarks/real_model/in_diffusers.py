"""Videos from a diffusers pipeline, loaded from a folder or a repository."""

from __future__ import annotations

import time
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from comfyui_liteattention import enabled
from comfyui_liteattention.presets import PRESETS, PresetName

from .store import DENSE, Job, Made

#: SageAttention, an attention in 8 bits: its name here, its package, its name in diffusers.
SAGE, _PACKAGE, _BACKEND = "SageAttention", "sageattention", "sage"


class DiffusersHost:
    """``call``: what the pipeline is called with besides prompt and seed."""

    def __init__(
        self, source: str, dtype: torch.dtype, offload: bool, call: dict[str, Any]
    ) -> None:
        from diffusers import DiffusionPipeline

        self.call = call
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
        if self.device.type == "cuda" and offload:
            self.pipe.enable_model_cpu_offload()
        else:
            self.pipe.to(self.device)

    def variants(self) -> list[str]:
        """Dense first; SageAttention where it is installed and there is a card for it."""
        eight_bit = [SAGE] if self.device.type == "cuda" and find_spec(_PACKAGE) else []
        return [DENSE, *eight_bit, *PRESETS]

    def warm_up(self, variant: str, prompt: str) -> None:
        """Load and compile what is needed once, so that it isn't timed."""
        self._video(Job(variant, prompt, 0), self.call | {"num_inference_steps": 2})

    def run(self, job: Job) -> Made:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        video, figures = self._video(job, self.call)
        figures["seconds"] = time.perf_counter() - begun
        if self.device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return Made(video, figures)

    def _video(self, job: Job, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        with ExitStack() as stack:
            session = None
            if job.variant in PRESETS:
                name = cast(PresetName, job.variant)
                session = stack.enter_context(enabled(self.pipe, preset=name))
            elif job.variant != DENSE:
                for transformer in self._transformers():
                    transformer.set_attention_backend(_BACKEND)
                    stack.callback(transformer.reset_attention_backend)
            generator = torch.Generator("cpu").manual_seed(job.seed)
            # Arrays are the one kind of output that all pipelines have.
            how: dict[str, Any] = {"prompt": job.prompt, "generator": generator}
            frames = self.pipe(**how, output_type="np", **call).frames[0]
            report = session.report() if session is not None else None
        video = (torch.from_numpy(frames).clamp(0, 1) * 255).round().byte()
        if report is None:
            return video, {}
        told = {"computed": report.computed_fraction, "backend": report.backend}
        return video, told | {"tokens": report.tokens, "reasons": report.reasons}

    def _transformers(self) -> list[Any]:
        parts = self.pipe.components.items()
        return [part for name, part in parts if name.startswith("transformer") and part is not None]
