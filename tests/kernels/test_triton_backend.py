"""The JIT backend: reasons, configurations, and its launch, interpreted on the CPU."""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.gpu import jit
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.kernel_table import (
    ATTEND,
    CONFIGS,
    TILE,
    Config,
    Method,
    Variant,
)
from comfyui_liteattention.backends.gpu.low_precision import LowPrecisionReference
from comfyui_liteattention.tiles import TileShape, make_lists

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def amd(monkeypatch):
    """Pretend that this torch is for AMD and that the card is of a given architecture."""

    def pretend(architecture: str) -> None:
        card = type("Card", (), {"gcnArchName": architecture})
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)

    return pretend


def test_reasons(monkeypatch):
    backend = KernelBackend(jit.JitLauncher())
    assert "on cpu" in backend.unavailable(CPU, "mass")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.unavailable(CARD, "mass") == "triton isn't installed"


@pytest.mark.parametrize(
    ("architecture", "tile"),
    [("gfx942:sramecc+", TILE), ("gfx1100", TileShape(64, 32)), ("gfx1201", TileShape(64, 32))],
)
def test_amd_cards_have_their_own_tiles(amd, architecture, tile):
    amd(architecture)
    assert KernelBackend(jit.JitLauncher()).tile_shape(128) == tile


@pytest.mark.parametrize(
    ("capability", "method", "expected"),
    [
        ((9, 0), Method(), CONFIGS[Method()][90][128]),
        ((7, 5), Method(), CONFIGS[Method()][80][128]),
        ((12, 0), Method(True, "e4m3"), CONFIGS[Method(True, "e4m3")][120][128]),
    ],
)
def test_nvidia_cards_use_the_table(monkeypatch, capability, method, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernel = Variant(128, "bf16", True, "mass", method)
    assert jit.JitLauncher()._config(kernel, CARD) == expected


@pytest.mark.parametrize(
    ("capability", "missing"), [((8, 9), False), ((10, 3), True), ((13, 0), False)]
)
def test_int8_is_left_out_where_the_table_says_so(monkeypatch, capability, missing):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "somewhere")
    assert jit.JitLauncher().missing(CARD, "native") is None
    assert (jit.JitLauncher().missing(CARD, "int8") is not None) == missing


def test_another_size_is_compiled_already(monkeypatch):
    pytest.importorskip("triton", reason="triton isn't installed, so there is nothing to compile")
    monkeypatch.delenv("TRITON_INTERPRET")
    function = jit.for_any_size.__wrapped__(ATTEND)
    unspecialised = [p.name for p in function.params if p.do_not_specialize]
    assert unspecialised == [
        *("heads", "lq", "lk", "tk", "ordered", "first_audited", "audited", "queries")
    ]


@pytest.mark.parametrize("mode", ["native", "int8"])
def test_the_launch_is_right(monkeypatch, mode):
    """With the tiles of another card than the prebuilt kernels'."""
    pytest.importorskip("triton", reason="triton isn't installed, so there is nothing to launch")
    from interpreted_kernel import why_not

    if reason := why_not():
        pytest.skip(reason)
    launcher = jit.JitLauncher()
    launcher.tile, launcher._amd = TileShape(64, 32), (TileShape(64, 32), Config(4, 1))
    backend = KernelBackend(launcher, mode)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    q, k, v = (torch.randn(1, 1, 100, 64, dtype=torch.float16) for _ in range(3))
    lists = make_lists(torch.tensor([[[[1, 1, 0, 1], [0, 1, 0, 0]]]], dtype=torch.bool))
    got = backend.forward(Inputs(q, k, v, 0.125), lists, "mass")
    reference = LowPrecisionReference(Method(int8=mode == "int8"), TileShape(64, 32))
    want = reference.forward(Inputs(q, k, v, 0.125), lists, "mass")
    assert torch.allclose(got.out, want.out, atol=2e-3) and torch.allclose(
        got.lse, want.lse, atol=1e-4
    )
    assert torch.equal(got.score > -torch.inf, want.score > -torch.inf)
