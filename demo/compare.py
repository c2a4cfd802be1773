"""The main job: one video, dense and with LiteAttention, in a real ComfyUI.

``python dev.py demo`` runs this. It loads ``demo/workflows/liteattention_demo.json``, runs it with
the LiteAttention node bypassed and with it, same seed, twice each in turns, and writes both videos,
the pictures of the report and the figures. It shows what is skipped, so in the workflow
LiteAttention stays on even where the machine's own attention is faster; with ``--never-slower`` it
is as presets have it. ``--long`` makes a video of 16,384 tokens, long enough to be made faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from tqdm import tqdm

from comfyui_liteattention.presets import preset
from comfyui_liteattention.report.compare import psnr

from .comfy_server import REPOSITORY, ComfyServer, Finished, Graph, comfyui_version, make_base
from .workflow import find, load_workflow, to_graph, without

WORKFLOW = REPOSITORY / "demo" / "workflows" / "liteattention_demo.json"
BUDGET, PATCH, REPORT = "LiteAttentionBudget", "LiteAttentionPatch", "LiteAttentionReport"
LATENT, SAMPLER, VIDEO = "LiteAttentionDemoLatent", "KSampler", "SaveAnimatedWEBP"
EQUAL = 100.0  # dB, where the videos are equal: JSON has no infinity
SHORT = {"frames": 16, "steps": 20, "rounds": 2}
LONG = {"frames": 64, "steps": 8, "rounds": 1}
PICTURES = ("heat_map", "chart", "tile_map")  # as the report node shows them


def main() -> None:
    options = _parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.long:
        print("A long video, made twice: up to 15 minutes on two cores. The bars say how long.")
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch))
        print("Starting ComfyUI ...")
        with ComfyServer(base, options.out / "comfyui.log") as server:
            figures = compare(server, options)
    print(summary(figures, options.out))
    text = json.dumps(figures, indent=2)
    (options.out / "figures.json").write_text(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)


def compare(server: ComfyServer, options: argparse.Namespace) -> dict[str, Any]:
    """Run the workflow both ways and measure."""
    lite = to_graph(load_workflow(WORKFLOW), server.get("/object_info"))
    sampler = lite[find(lite, SAMPLER)]["inputs"]
    sampler.update(seed=options.seed, steps=options.steps)
    lite[find(lite, LATENT)]["inputs"].update(frames=options.frames)
    budget = lite[find(lite, BUDGET)]["inputs"]
    # Presets differ in nothing but the closeness.
    budget.update(closeness=preset(options.preset).closeness, never_slower=options.never_slower)
    dense = without(without(lite, PATCH, "model"), REPORT, "latent")

    _warm_up(server, (dense, lite))
    # Alternating, so that a machine that slows down for a while slows both down.
    rounds = [
        {"dense": _run(server, dense, "dense"), "lite": _run(server, lite, "LiteAttention")}
        for _ in range(options.rounds)
    ]
    runs = rounds[0]
    videos = {name: server.output_file(_image(lite, run, VIDEO)) for name, run in runs.items()}
    for name, path in videos.items():
        shutil.copy(path, options.out / f"{name}.webp")
    report = runs["lite"].outputs[find(lite, REPORT)]
    for name, image in zip(PICTURES, report["images"], strict=False):
        shutil.copy(server.output_file(image), options.out / f"{name}.png")
    (options.out / "report.txt").write_text(report["text"][0] + "\n")
    return {
        "dense_seconds": min(r["dense"].seconds[find(dense, SAMPLER)] for r in rounds),
        "lite_seconds": min(r["lite"].seconds[find(lite, SAMPLER)] for r in rounds),
        "computed_fraction": report["report"][0]["computed_fraction"],
        "lost_mass_mean": report["report"][0]["lost_mass_mean"],
        "psnr_db": min(psnr(*map(read_video, videos.values())), EQUAL),
        "tokens": report["report"][0]["tokens"],
        "frames": options.frames,
        "steps": options.steps,
        "rounds": options.rounds,
        "seed": options.seed,
        "preset": options.preset,
        "never_slower": options.never_slower,
        "backend": report["report"][0]["backend"],
        "comfyui_version": comfyui_version(server.path),
    }


def summary(figures: dict[str, Any], out: Path) -> str:
    lost = figures["lost_mass_mean"]
    measured = "not measured" if lost is None else f"{lost:.2%}"
    faster = figures["dense_seconds"] / figures["lite_seconds"]
    return f"""
                 dense   LiteAttention
  seconds     {figures["dense_seconds"]:8.1f}   {figures["lite_seconds"]:13.1f}   {faster:.2f}x
  tiles           100%   {figures["computed_fraction"]:13.1%}   of the attention computed
  lost mass          0   {measured:>13}   of the softmax, on a rotating sample
  closeness          -   {figures["psnr_db"]:10.1f} dB   PSNR to the dense video, same seed

{figures["tokens"]} tokens, {figures["steps"]} steps, ComfyUI {figures["comfyui_version"]}, \
{figures["backend"]} backend
Look at {out}: dense.webp, lite.webp, {", ".join(f"{name}.png" for name in PICTURES)}, report.txt
"""


def read_video(path: Path) -> torch.Tensor:
    """Lossless WEBP -> ``[frames, H, W, 3]`` float 0..1."""
    with Image.open(path) as file:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
    return torch.from_numpy(np.stack(frames)).float() / 255


def _run(server: ComfyServer, graph: Graph, name: str) -> Finished:
    with tqdm(total=graph[find(graph, SAMPLER)]["inputs"]["steps"], desc=f"{name:>13}") as bar:

        def progress(value: int, total: int) -> None:
            bar.total = total
            bar.update(value - bar.n)

        finished = server.run(graph, progress)
    if finished.error:
        raise RuntimeError(f"ComfyUI could not run the {name} workflow: {finished.error}")
    return finished


def _warm_up(server: ComfyServer, graphs: tuple[Graph, ...]) -> None:
    """Load the model and the kernel, so that the timed runs hold sampling alone."""
    for graph in graphs:
        short = json.loads(json.dumps(graph))
        short[find(short, SAMPLER)]["inputs"].update(steps=2, seed=0)
        _run(server, short, "warm-up")


def _image(graph: Graph, run: Finished, class_type: str) -> dict[str, str]:
    return run.outputs[find(graph, class_type)]["images"][0]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.py demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the results")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="16,384 tokens, 8 steps, one round")
    parser.add_argument("--frames", type=int, help="256 tokens each; 1 to 64")
    parser.add_argument("--steps", type=int)
    parser.add_argument(
        "--rounds", type=int, help="runs of each kind, alternating; the fastest counts"
    )
    parser.add_argument(
        "--never-slower", action="store_true", help="use the machine's own attention while faster"
    )
    parser.add_argument("--preset", default="Balanced", help="Safe, Balanced or Fast")
    options = parser.parse_args()
    for name, value in (LONG if options.long else SHORT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
