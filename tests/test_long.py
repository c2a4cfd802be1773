"""benchmarks.long: a video dense and with a preset as it ships, and the table of it."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import long
from benchmarks.demo_video import Sampled


def test_it_measures_what_a_person_waits_for(monkeypatch, tmp_path, capsys):
    results = tmp_path / "long.json"
    arguments = "--tokens 2048 --steps 2 --presets Fast --rounds 1 --noise-floor --json"
    monkeypatch.setattr(sys, "argv", ["benchmarks.long", *arguments.split(), str(results)])
    long.main()
    rows = json.loads(results.read_text())["rows"]
    assert [row["way"] for row in rows] == ["dense", "Fast", *long.NOISE_FLOOR]
    assert all(row["tokens"] == 2048 and len(row["all_seconds"]) == 1 for row in rows)
    assert all(row["seconds"] == min(row["all_seconds"]) > 0 for row in rows)
    assert all(row["psnr_db"] > 25 for row in rows[1:])
    assert "dense, bfloat16" in capsys.readouterr().out


def test_the_fastest_round_counts_and_the_first_way_is_what_others_are_compared_with():
    video = torch.rand(2, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    seconds = iter([10.0, 5.0, 8.0, 4.0])

    def way(change: float, computed: float):
        return lambda: Sampled(video + change, computed, 0.0, next(seconds))

    rows = long.measure({"dense": way(0, 1.0), "Fast": way(0.01, 0.4)}, rounds=2)
    dense, fast = ({"tokens": 512, "steps": 8} | row for row in rows)
    assert dense["seconds"] == 8.0 and "psnr_db" not in dense
    assert fast["all_seconds"] == [5.0, 4.0] and fast["psnr_db"] == pytest.approx(40, abs=0.1)
    assert "2.00x  40.0%  40.0 dB" in long.table([dense, fast])


@pytest.mark.parametrize(("tokens", "expected"), [(256, 1), (4096, 61), (16384, 253)])
def test_pictures(tokens, expected):
    assert long.pictures(tokens) == expected
