"""Whole runs of the demo model on the device: how close the presets stay to its dense video.

LiteAttention stays on where it is slower: what is looked at is what it computes.
With diffusers' class where that is installed, else with ComfyUI's, where ``COMFYUI_PATH`` says
where one is or this repository lies in its ``custom_nodes``; else there is nothing to run it with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from comfyui_liteattention.presets import PRESETS, PresetName, preset
from comfyui_liteattention.report.compare import psnr
from comfyui_liteattention.report.statistics import RunReport
from demo.latents import decode
from demo.model import SHIFT, TEXT_TABLE, WEIGHTS, load_diffusers_model
from demo.sample import SampleConfig, sample
from demo.text import embed_prompts, load_table

from .bench import Bench

NO_HOST = "neither diffusers nor ComfyUI found (COMFYUI_PATH=... says where one is)"
EQUAL = 100.0  # dB, where the videos are equal: JSON has no infinity


class Drawn(NamedTuple):
    """A latent ``[1, 16, F, h, w]`` float32 on the CPU, and what LiteAttention said."""

    latent: Tensor
    report: RunReport | None


#: A preset's name, or None for dense.
Host: TypeAlias = Callable[[str | None], Drawn]


def demo_runs(bench: Bench) -> dict[str, Any]:
    """Rows by preset: seconds, dB to the dense video, tiles. The first repeats the dense run: what
    two runs differ by without us."""
    found = host(bench)
    if found is None:
        return {"left_out": NO_HOST}
    name, draw = found
    dense = decode(draw(None).latent)
    rows: list[dict[str, Any]] = []
    for chosen in (None, *PRESETS):
        if bench.left <= 0:
            rows.append({"preset": chosen, "left_out": "no time left"})
            continue
        begun = bench.clock()
        drawn = draw(chosen)
        row = {"preset": chosen, "seconds": bench.clock() - begun}
        rows.append(row | {"psnr_db": _closeness(dense, decode(drawn.latent))} | _told(drawn))
    return {"host": name, "steps": bench.steps, "rows": rows}


def host(bench: Bench) -> tuple[str, Host] | None:
    """What can run the model here."""
    if find_spec("diffusers") is not None:
        return "diffusers", in_diffusers(bench)
    path = comfyui_path()
    return None if path is None else ("ComfyUI", in_comfyui(bench, path))


def comfyui_path() -> Path | None:
    """The ComfyUI that ``COMFYUI_PATH`` names, or whose ``custom_nodes`` hold this repository."""
    named = os.environ.get("COMFYUI_PATH")
    candidates = [Path(named)] if named else Path(__file__).absolute().parents
    return next((path for path in candidates if (path / "comfyui_version.py").is_file()), None)


def in_diffusers(bench: Bench) -> Host:
    from comfyui_liteattention import enabled

    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    model = narrow(load_diffusers_model(WEIGHTS), dtype).to(bench.device)
    table = load_table(TEXT_TABLE)
    config = SampleConfig(steps=bench.steps, shape=bench.latent)

    def on_device(latent: Tensor, t: Tensor, texts: Tensor, **rest: Any) -> tuple[Tensor]:
        inputs = (latent.to(bench.device, dtype), t.to(bench.device), texts.to(bench.device, dtype))
        return (model(*inputs, **rest)[0].float().cpu(),)

    def draw(chosen: str | None) -> Drawn:
        name = cast(PresetName, chosen)
        on = enabled(model, preset=name, never_slower=False) if chosen else nullcontext()
        with on as session:
            latent = sample(on_device, table, config)
            return Drawn(latent, session.report() if session else None)

    return draw


def narrow(model: Any, dtype: torch.dtype) -> Any:
    """In this dtype, but for what diffusers itself would load in float32."""
    kept = {*model._keep_in_fp32_modules}
    for name, parameter in model.named_parameters():
        if not kept & {*name.split(".")}:
            parameter.data = parameter.data.to(dtype)
    return model


def in_comfyui(bench: Bench, path: Path) -> Host:
    sys.path.insert(0, str(path))
    import_module("comfy.cli_args").args.cpu = bench.device.type == "cpu"
    sd, sampling = import_module("comfy.sd"), import_module("comfy.sample")
    session = import_module("comfyui_liteattention.integrations.comfy.session")
    advanced = import_module("comfy_extras.nodes_model_advanced")
    loaded = sd.load_diffusion_model(str(WEIGHTS))
    model = advanced.ModelSamplingSD3().patch(loaded, SHIFT)[0]
    config, table = SampleConfig(), load_table(TEXT_TABLE)
    texts = [[[embed_prompts([text], table), {}]] for text in (config.prompt, "")]
    latent = torch.zeros((1, *bench.latent))

    def draw(chosen: str | None) -> Drawn:
        patched = model
        if chosen:
            always = replace(preset(chosen), never_slower=False)
            patched = session.apply_patch(model, always)
        noise = sampling.prepare_noise(latent, config.seed)
        how = (bench.steps, config.guidance, "euler", "simple", *texts, latent)
        with torch.inference_mode():
            result = sampling.sample(patched, noise, *how, seed=config.seed)
        patch = session.patch_of(patched)
        return Drawn(result.float().cpu(), patch.last_report if patch else None)

    return draw


def _closeness(a: Tensor, b: Tensor) -> float:
    """Of videos in -1..1."""
    return min(psnr(*((x.clamp(-1, 1) + 1) / 2 for x in (a, b))), EQUAL)


def _told(drawn: Drawn) -> dict[str, Any]:
    report = drawn.report
    if report is None:
        return {}
    said = {"backend": report.backend, "computed": report.computed_fraction}
    return said | {"stopped": report.stopped, "reasons": report.reasons}
