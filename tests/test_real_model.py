"""The benchmark for real weights, end to end with the demo's, in both hosts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from demo_pipeline import CALL, save_pipeline, words_with_slots

from benchmarks.real_model import in_comfyui
from benchmarks.real_model.__main__ import main
from benchmarks.real_model.result import Row, table
from benchmarks.real_model.store import Job, Made, Store, jobs
from comfyui_liteattention.presets import PRESETS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command line: a prompt of the demo, 2,048 tokens, 3 steps."""
    pytest.importorskip("accelerate", reason="diffusers loads no Wan pipeline without it")
    folder = tmp_path_factory.mktemp("real")
    save_pipeline(folder / "pipeline")
    (folder / "prompts.txt").write_text(words_with_slots("red circle moving right"))
    call = CALL | {"height": 64, "width": 64, "num_frames": 7, "num_inference_steps": 3}
    return [
        *("--pipeline", str(folder / "pipeline"), "--dtype", "float32"),
        *("--prompts", str(folder / "prompts.txt"), "--out", str(folder / "out")),
        *("--call", *(f"{key}={value}" for key, value in call.items())),
    ]


def test_killed_in_the_middle_and_started_again(command, capsys):
    out = Path(command[command.index("--out") + 1])
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.real_model", *command], cwd=ROOT)
    deadline = time.monotonic() + 900
    while not (first := [*(out / "runs").glob("*.json")]) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert 1 <= len(first) < 1 + len(PRESETS)
    before = {path: path.stat().st_mtime_ns for path in first}

    main(command)
    said = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in first} == before
    found = json.loads((out / "real_model.json").read_text())
    assert len(found["runs"]) == 1 + len(PRESETS)
    rows = {row["variant"]: row for row in found["rows"]}
    assert [*rows] == ["dense", *PRESETS] and rows["dense"]["videos"] == 1
    for name in PRESETS:
        assert rows[name]["psnr_db"] > 20 and 0.9 < rows[name]["ssim"] <= 1
        assert rows[name]["speedup"] > 0
    for run in found["runs"]:
        if run["variant"] in PRESETS:  # so small a video is dense if that is faster, and it says so
            reasons = " ".join(run["reasons"])
            assert run["computed"] < 1 or "faster" in reasons or "too little" in reasons
    assert len([*out.glob("*.png")]) == len(PRESETS)
    assert "| dense | 1 |" in said and "its paper's figures" in said

    main(command)  # all there: nothing is made
    assert "[1/" not in capsys.readouterr().out


def test_another_choice_needs_another_folder(command):
    with pytest.raises(ValueError, match="choose another --out"):
        main([*command, "guidance_scale=5"])


def test_a_video_without_figures_is_made_again(tmp_path):
    store, job = Store(tmp_path, {}), Job("dense", "a cat", 3)
    store.keep(job, Made(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), {"seconds": 1.0}))
    assert store.has(job) and store.figures(job)["seed"] == 3
    (tmp_path / "runs" / f"{job.key}.json").unlink()
    assert not store.has(job)


def test_rows_are_whole_before_the_next_video():
    made = jobs(("dense", "Fast"), ("a", "b"), (0,))
    assert [(job.variant, job.prompt) for job in made[:3]] == [
        *(("dense", "a"), ("Fast", "a"), ("dense", "b"))
    ]
    assert len({job.key for job in made}) == 4


def test_table():
    text = table([Row("Fast", 2, 10.0, 1.9, 12.0, 0.4, 35.0, 33.1, 0.98, None)])
    assert "| Fast | 2 | 10.0 | 1.90x | 12.0 | 40.0% | 35.0 (33.1) dB | 0.9800 | - |" in text


GRAPH = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan"}},
    "2": {"class_type": "LiteAttentionPatch", "inputs": {"model": ["1", 0], "preset": "Safe"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["9", 0]}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["9", 0]}},
    "5": {
        "class_type": "KSampler",
        "inputs": {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "seed": 1},
    },
    "6": {"class_type": "LiteAttentionReport", "inputs": {"model": ["2", 0], "latent": ["5", 0]}},
    "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0]}},
    "8": {"class_type": "SaveAnimatedWEBP", "inputs": {"images": ["7", 0]}},
    "9": {"class_type": "CLIPLoader", "inputs": {}},
}


def test_what_comfyui_is_asked_for():
    dense = in_comfyui.graph_of(GRAPH, Job("dense", "a dog", 7))
    assert {part["class_type"] for part in dense.values()} == {
        *("UNETLoader", "CLIPTextEncode", "KSampler", "VAEDecode", "CLIPLoader", "SaveImage")
    }
    assert dense["5"]["inputs"] | {"seed": 7, "model": ["1", 0]} == dense["5"]["inputs"]
    assert dense["3"]["inputs"]["text"] == "a dog" and dense["4"]["inputs"]["text"] == ""
    fast = in_comfyui.graph_of(GRAPH, Job("Fast", "a dog", 7))
    assert fast["2"]["inputs"] == {"model": ["1", 0], "preset": "Fast"}
    assert GRAPH["3"]["inputs"]["text"] == "a cat"
