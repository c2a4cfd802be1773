"""Closeness against speed on real weights. Runs unattended; started again, it continues.

    python -m benchmarks.real_model --pipeline Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    python -m benchmarks.real_model --comfyui 127.0.0.1:8188 --workflow FILE.json

A handful of prompts and seeds, each dense, dense in SageAttention where that is installed, and with
every preset: seconds, peak memory, PSNR, SSIM and (where its weights are present) LPIPS to the
dense video of the same seed, pictures side by side, ``real_model.json`` and a table.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.record import describe_machine
from comfyui_liteattention.report.perceptual import lpips_distance

from .in_comfyui import ComfyHost
from .in_diffusers import DiffusersHost
from .result import draw, measure, summarise, table
from .store import Job, Made, Store, jobs

PROMPTS = (
    "A golden retriever runs along a beach at sunset, waves in the background, camera follows",
    "A crowded night market in the rain, neon signs reflected in puddles, people with umbrellas",
    "A potter's hands shape a spinning clay vase, close-up, soft window light",
    "A red vintage car drives down a winding mountain road, aerial view, autumn forest",
)


class Host(Protocol):
    """What makes videos."""

    def variants(self) -> list[str]: ...

    def warm_up(self, variant: str, prompt: str) -> None: ...

    def run(self, job: Job) -> Made: ...


def make_videos(host: Host, store: Store, wanted: Sequence[Job]) -> None:
    """Make the videos that are missing. Each variant is warmed up before its first video."""
    warm: set[str] = set()
    missing = [job for job in wanted if not store.has(job)]
    for n, job in enumerate(missing):
        if job.variant not in warm:
            host.warm_up(job.variant, job.prompt)
            warm.add(job.variant)
        made = host.run(job)
        store.keep(job, made)
        took = f"{made.figures['seconds']:.1f} s"
        print(f"[{n + 1}/{len(missing)}] {job.variant}, seed {job.seed}: {took}", flush=True)


def conclude(store: Store, wanted: Sequence[Job]) -> str:
    """Write the JSON, the pictures, and the table of the runs that are done."""
    runs = measure(store, wanted, lpips_distance())
    rows = summarise(runs)
    result = {"machine": describe_machine() | _card(), "runs": runs}
    result["rows"] = [row._asdict() for row in rows]
    text = json.dumps(result, indent=1)
    (store.folder / "real_model.json").write_text(text + "\n", encoding="utf-8")
    draw(store, wanted)
    return table(rows)


def _card() -> dict[str, str]:
    return {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _option(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``: a number, a list, a word."""
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--pipeline", help="diffusers: a folder or a repository")
    where.add_argument("--comfyui", metavar="ADDRESS", help="a ComfyUI that runs; --workflow too")
    parser.add_argument("--workflow", type=Path, help="with a LiteAttention node, as saved")
    parser.add_argument("--prompts", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", help="some of them, dense first; default: all")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--offload", action="store_true", help="keep on the card what works")
    called = "what else the pipeline is called with: height=480 num_frames=81 ..."
    parser.add_argument("--call", type=_option, nargs="*", default=[], help=called)
    parser.add_argument("--out", type=Path, default=Path("real_model"), help="folder of results")
    options = parser.parse_args(arguments)
    if options.comfyui and not options.workflow:
        parser.error("--comfyui needs --workflow")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    source = options.pipeline or str(options.workflow)
    about = {"source": source, "dtype": options.dtype, "call": dict(options.call)}
    store = Store(options.out, about)
    prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else None
    host: Host
    if options.pipeline:
        dtype = getattr(torch, options.dtype)
        host = DiffusersHost(options.pipeline, dtype, options.offload, dict(options.call))
        prompts = prompts or list(PROMPTS)
    else:
        host = found = ComfyHost(options.comfyui, options.workflow)
        prompts = prompts or found.prompts()
    wanted = jobs(options.variants or host.variants(), filter(None, prompts), options.seeds)
    make_videos(host, store, wanted)
    print(conclude(store, wanted))


if __name__ == "__main__":
    main()
