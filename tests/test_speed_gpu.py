"""The benchmark for cards does all that it would do there, on the CPU and without a clock."""

from __future__ import annotations

import pytest
import torch

from benchmarks import speed_gpu
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import TileShape


@pytest.fixture
def no_card(monkeypatch):
    """Every call takes 2 ms, our dense one 4."""

    def milliseconds(calls, repeats):
        for call in calls.values():
            call()
        return {name: [4.0 if name == "dense" else 2.0] * repeats for name in calls}

    monkeypatch.setattr(speed_gpu, "milliseconds", milliseconds)
    monkeypatch.setattr(speed_gpu, "DEVICE", torch.device("cpu"))


def test_every_share_has_two_rows_the_kernel_and_the_whole_call(no_card, one_thread):
    backend = ReferenceBackend(TileShape(128, 64), torch.float32)
    rows = speed_gpu.measure(backend, 512, 64, 1, "bfloat16", 3)
    shares = [f"{skipped:.0%}" for skipped in speed_gpu.SKIPPED]
    whole = [call for share in shares for call in (share, f"{share} whole")]
    assert [row["call"] for row in rows] == ["dense", *whole]
    half = next(row for row in rows if row["call"] == "50% whole")
    assert (half["computed"], half["of_dense"]) == (0.5, 0.5)
    assert speed_gpu.show(half).endswith("of dense 0.500, goal 0.535")
    assert speed_gpu.measure_companions(512, 64, 1, "bfloat16", 3)[0]["ms"] == 2


@pytest.mark.parametrize(
    "tokens, grid", [(8192, (16, 16, 32)), (75600, (42, 40, 45)), (7, (1, 1, 7))]
)
def test_any_number_of_tokens_is_a_video(tokens, grid):
    assert speed_gpu.grid_of(tokens) == grid
