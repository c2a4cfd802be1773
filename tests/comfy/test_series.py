"""Twenty generations in one running ComfyUI: what one leaves behind must not reach another.

Different models, sizes, seeds and batches, nodes that come and go, interrupted runs; then every
result must be, bit for bit, that of its own fresh process.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

HERE = Path(__file__).parent
SETTINGS = {"threshold": -0.1, "criterion": "gap", "ramp": 0.0, "warmup": 0.0, "dense_layers": ""}
SETTINGS |= {"audit": 0, "min_tokens": 0, "order": "compact", "never_slower": False}
EASYCACHE = {"reuse_threshold": 3.0, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
GROWTH = 24  # MB that come and go: the allocator takes 8 at a time

KINDS = {
    "wan": dict(model="Wan T2V", frames=4),
    "without": dict(model="Wan T2V", frames=4, lite=False),
    "long": dict(model="Wan T2V", frames=8, seed=2),
    "pair": dict(model="Wan T2V", frames=3, batch=2),
    "split": dict(model="Wan T2V", frames=4, split=True),
    "easycache": dict(model="Wan T2V", frames=4, easycache=True),
    "ltx": dict(model="LTX-Video", frames=4, seed=3),
    "hunyuan": dict(model="HunyuanVideo", frames=4, seed=4),
    "cosmos": dict(model="Cosmos Predict2", frames=4, seed=6),
}
CUT = dict(model="Wan T2V", frames=16, seed=7, steps=200)
ONCE = [*KINDS, "interrupted"]
# ComfyUI doesn't run the same graph twice in a row.
SERIES = ONCE + ONCE[::-1] + ONCE[1:] + ONCE[:1]


def graph(name, model, frames, seed=1, steps=5, batch=1, lite=True, easycache=False, split=False):
    """A generation that saves its latent as ``name``."""
    nodes = {
        "model": node("TinyModel", name=model),
        "positive": node("TinyText", name=model, seed=seed),
        "negative": node("TinyText", name=model, seed=seed + 50),
        "latent": node("TinyLatent", name=model, frames=frames, batch=batch),
    }
    last = ["model", 0]
    if easycache:
        nodes["easycache"] = node("EasyCache", model=last, **EASYCACHE)
        last = ["easycache", 0]
    if lite:
        nodes["threshold"] = node("LiteAttentionThreshold", **SETTINGS)
        control = {"preset": "Balanced", "control": ["threshold", 0]}
        nodes["lite"] = node("LiteAttentionPatch", model=last, **control)
        last = ["lite", 0]
        looked_at = {"model": last, "latent": ["sampler", 0], "theme": "dark"}
        nodes["report"] = node("LiteAttentionReport", **looked_at)
    common = {"model": last, "positive": ["positive", 0], "negative": ["negative", 0]}
    common |= {"steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
    if split:
        nodes["first"] = part(common, "latent", seed, 0, 3)
        nodes["sampler"] = part(common, "first", seed, 3, steps)
    else:
        latent = {"latent_image": ["latent", 0], "seed": seed, "denoise": 1.0}
        nodes["sampler"] = node("KSampler", **common, **latent)
    nodes["save"] = node("SaveLatent", samples=["sampler", 0], filename_prefix=name)
    return nodes


def part(common, latent, seed, start, end):
    """Some of the steps: the first ones add noise, and leave some for the others."""
    some = {"start_at_step": start, "end_at_step": end, "noise_seed": seed}
    for what in ("add_noise", "return_with_leftover_noise"):
        some[what] = "disable" if start else "enable"
    return node("KSamplerAdvanced", **common, **some, latent_image=[latent, 0])


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def latent_in(folder, name, number):
    """What the graph ``name`` saved when it ran for the ``number``-th time."""
    saved = safetensors.torch.load_file(folder / "output" / f"{name}_{number:05}_.latent")
    return saved["latent_tensor"]


def resident(server):
    """Megabytes of memory that the server holds."""
    status = Path(f"/proc/{server._process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def run(server, kind):
    if kind != "interrupted":
        finished = server.run(graph(kind, **KINDS[kind]))
        assert finished.error is None
        return finished.outputs
    stop = server.run(graph(kind, **CUT), lambda *_: server.post("/interrupt", {}))
    assert stop.error == "interrupted"
    return stop.outputs


@pytest.fixture(scope="module")
def alone(new_base):
    """The base directory in which every kind has run in a fresh process."""
    base = new_base()
    graphs = base / "graphs.json"
    graphs.write_text(json.dumps([graph(name, **kind) for name, kind in KINDS.items()]))
    command = [sys.executable, str(HERE / "fresh.py"), str(base), str(graphs)]
    subprocess.run(command, check=True, capture_output=True)
    return base


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_thirty_generations_leave_nothing_behind(server, alone):
    memory, reports = [], []
    for kind in SERIES:
        outputs = run(server, kind)
        reports += [outputs["report"]["report"][0]] if "report" in outputs else []
        memory.append(resident(server))
    for name in KINDS:
        fresh = latent_in(alone, name, 1)
        assert fresh.isfinite().all()
        for number in (1, 2, 3):
            assert torch.equal(latent_in(server.base, name, number), fresh), (name, number)
    assert not torch.equal(latent_in(alone, "wan", 1), latent_in(alone, "without", 1))
    assert len(reports) == 3 * (len(KINDS) - 1)
    assert all(report["active"] and report["computed_fraction"] < 1 for report in reports)
    assert max(memory[20:]) < max(memory[:20]) + GROWTH

    last = server.run({"1": node("Leftovers")} | graph("without", **KINDS["without"], seed=9))
    assert last.outputs["1"]["leftovers"] == [{}]
