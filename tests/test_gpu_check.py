"""The command for cards does all that it would do there, on the CPU; the CPU's kernel stands in."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks.gpu_check import demo_runs, rivals, speed
from benchmarks.gpu_check.__main__ import TRIAL, check
from benchmarks.gpu_check.bench import Bench, providers_on
from benchmarks.gpu_check.journal import Journal
from benchmarks.gpu_check.summary import line

CPU = torch.device("cpu")


def bench(seconds=600.0, **others):
    size = TRIAL | {"tokens": (640,), "steps": 2} | others
    return Bench(CPU, providers_on(CPU), time.monotonic() + seconds, **size)


def test_all_of_it(tmp_path, monkeypatch):
    for name in ("SDPA flash", "SDPA cuDNN"):
        monkeypatch.delitem(rivals.RIVALS, name)
    monkeypatch.setitem(rivals.RIVALS, "SDPA", torch.nn.functional.scaled_dot_product_attention)
    text = check(bench(), tmp_path)
    said = text.splitlines()[-1]
    assert said.startswith("no card | torch ")
    assert "self-tests pass" in said and "Balanced" in said and "of SDPA: dense" in said
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"selftests", "accuracy", "demo", "speed"}
    rows = {row["call"]: row for row in found["speed"]["rows"]}
    shares = [f"{share:.0%}" for share in speed.SKIPPED]
    ours = ["dense", *(f"{s}{kind}" for s in shares for kind in ("", " whole"))]
    assert [*rows] == ["SDPA", *ours]
    assert rows["50%"]["computed"] == 0.5 and rows["dense"]["of_dense"] == 1
    assert "FlashAttention 3" in found["speed"]["left_out"]
    again, *presets = found["demo"]["rows"]
    assert again["preset"] is None and again["psnr_db"] == demo_runs.EQUAL
    # Two steps are too few to skip much, and audits count.
    assert all(row["psnr_db"] > 20 and 0.5 < row["computed"] < 1.1 for row in presets)
    errors = [row["error"] for row in found["accuracy"]["rows"]]
    assert all(0 < error["native"] < 0.02 for error in errors)

    # Started again, nothing is measured anew.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert check(bench(), tmp_path) == text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_fails_says_why_and_is_tried_again(tmp_path):
    journal = Journal(tmp_path)

    def broken():
        raise RuntimeError("no such kernel")

    assert journal.run("speed", broken)["failed"] == "RuntimeError: no such kernel"
    assert "speed failed" in line({"installed": {}, "speed": journal.run("speed", broken)})
    assert journal.run("speed", lambda: {"rows": []})["rows"] == []
    (tmp_path / "speed.json").write_text('{"rows": [')  # a machine that went down meanwhile
    assert journal.done("speed") is None


def test_time_is_up(tmp_path, capsys):
    said = check(bench(seconds=-1), tmp_path).splitlines()[-1]
    assert not any(tmp_path.iterdir()) and "start again" in capsys.readouterr().out
    assert "self-tests not run" in said


def test_the_demo_in_comfyui(monkeypatch):
    """Where there is no diffusers."""
    from demo.comfy_server import comfyui_path

    monkeypatch.setattr(demo_runs, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert demo_runs.demo_runs(bench()) == {"left_out": demo_runs.NO_HOST}
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_path()))
    found = demo_runs.demo_runs(bench())
    assert found["host"] == "ComfyUI" and len(found["rows"]) == 4
    assert found["rows"][0]["psnr_db"] == demo_runs.EQUAL


def test_the_demo_in_the_dtype_of_cards():
    model = demo_runs.narrow(demo_runs.load_diffusers_model(demo_runs.WEIGHTS), torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.blocks[0].norm2.weight.dtype == torch.float32
    latent, texts = torch.randn(1, 16, 1, 8, 8).bfloat16(), torch.randn(1, 8, 4096).bfloat16()
    out = model(latent, torch.tensor([500.0]), texts, return_dict=False)[0]
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "grid"), [(8192, (16, 16, 32)), (75600, (42, 40, 45)), (7, (1, 1, 7))]
)
def test_any_number_of_tokens_is_a_video(tokens, grid):
    assert speed.grid_of(tokens) == grid
