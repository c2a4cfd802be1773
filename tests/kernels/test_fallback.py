"""Which of several ways to run the kernel is taken, and what users hear about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_liteattention import backends
from comfyui_liteattention.backends import kernel_selftest
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.first_trusted import FirstTrusted
from comfyui_liteattention.backends.gpu.jit import JitLauncher
from comfyui_liteattention.backends.gpu.kernel_table import Method
from comfyui_liteattention.backends.gpu.launches import CONSTRAINTS
from comfyui_liteattention.backends.gpu.prebuilt import PrebuiltLauncher
from comfyui_liteattention.backends.kernel_selftest import NO_MEMORY
from comfyui_liteattention.backends.modes import Chosen, mode_for, recognise
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import TileShape

TILE = TileShape(128, 64)
CARD = torch.device("cuda", 0)


class Fake(ReferenceBackend):
    """A candidate with the reference's numbers, which fails its self-test at some head_dims."""

    def __init__(self, name, fails=()):
        super().__init__(TILE)
        self.name, self.fails, self.tests = name, fails, 0

    def unsupported(self, q, k, v):
        return replace(CONSTRAINTS, device="cpu").check(q, k, v)

    def provide(self, device, head_dim, dtype):
        self.tests += 1
        return "self-test failed" if head_dim in self.fails else self

    def begin_run(self):
        pass


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    choose = backends._card
    choose.cache_clear()
    yield
    choose.cache_clear()


def draw(d=64, dtype=torch.float16):
    return tuple(torch.randn(1, 1, 130, d).to(dtype) for _ in range(3))


KIND = (CARD, 64, torch.float16)


def test_the_first_is_taken_and_no_other_is_tested(caplog):
    first, second = Fake("first"), Fake("second")
    provider = FirstTrusted([first, second])
    assert provider.name == "first" and provider.tile_shape(64) == TILE
    assert provider.provide(*KIND) is provider.provide(*KIND) is first
    assert (first.tests, second.tests, provider.name) == (1, 0, "first")
    assert not caplog.records


def test_a_failed_self_test_leads_to_the_next_and_is_said_once(caplog):
    first, second = Fake("first", (64,)), Fake("second")
    provider = FirstTrusted([first, second])
    for _ in range(3):
        assert provider.provide(*KIND) is second
    assert provider.name == "second"
    assert [r.getMessage() for r in caplog.records] == [
        "LiteAttention uses second: first: self-test failed"
    ]
    assert provider.provide(CARD, 128, torch.float16) is first
    assert provider.name == "first and second", "the first is fine at another head_dim"


def test_where_all_fail_every_reason_is_given():
    provider = FirstTrusted([Fake("first", (64,)), Fake("second", (64,))])
    assert provider.provide(*KIND) == "first: self-test failed; second: self-test failed"


def test_a_lack_of_memory_stays_for_a_run_and_leads_to_no_other(monkeypatch):
    first, second = Fake("first"), Fake("second")
    full = [NO_MEMORY]
    monkeypatch.setattr(first, "provide", lambda *_: full.pop() if full else first)
    provider = FirstTrusted([first, second])
    monkeypatch.setattr(backends, "_card", lambda *_: provider)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for _ in range(2):
        assert provider.provide(*KIND) == NO_MEMORY
    assert backends.backend_for(CARD).provide(*KIND) is first
    assert provider.name == "first" and second.tests == 0


def test_what_the_kernel_cannot_take_is_not_tested():
    first = Fake("first")
    assert "float32" in FirstTrusted([first]).unsupported(*draw(dtype=torch.float32))
    assert first.tests == 0


@pytest.mark.parametrize(
    ("mode", "missing", "names"),
    [
        ("native", (), ["cuda", "triton"]),
        ("native", ("cuda",), ["triton"]),
        ("int8", (), ["cuda, int8", "triton, int8", "cuda", "triton"]),
        ("int8", ("cuda, int8", "triton, int8"), ["cuda", "triton"]),
        ("fp8", ("triton, fp8",), ["cuda, fp8", "cuda, int8", "triton, int8", "cuda", "triton"]),
    ],
)
def test_order_of_the_candidates(monkeypatch, mode, missing, names):
    def unavailable(self, device, criterion):
        return "not here" if self.name in missing else None

    monkeypatch.setattr(KernelBackend, "unavailable", unavailable)
    backend = backends._card(CARD, Chosen(mode), "mass")
    assert [c.name for c in backend._candidates] == names


def test_no_candidate_is_a_reason(monkeypatch):
    monkeypatch.setattr(KernelBackend, "unavailable", lambda *_: "not here")
    assert backends._card(CARD, Chosen(), "mass") == "cuda: not here; triton: not here"


def test_the_peak_gap_is_for_triton_alone(monkeypatch):
    monkeypatch.setattr(JitLauncher, "missing", lambda *_: None)
    monkeypatch.setattr(PrebuiltLauncher, "missing", lambda *_: None)
    backend = backends._card(CARD, Chosen(), "gap")
    assert [c.name for c in backend._candidates] == ["triton"]
    monkeypatch.setattr(JitLauncher, "missing", lambda *_: "triton isn't installed")
    backends._card.cache_clear()
    assert backends._card(CARD, Chosen(), "gap") == (
        "cuda: the gap criterion is not among the prebuilt kernels; triton: triton isn't installed"
    )


@pytest.mark.parametrize(
    ("wanted", "attention", "capability", "mode"),
    [
        ("auto", "attention_pytorch", 89, "native"),
        ("auto", "comfy.ldm.modules.attention.attention_sage", 120, "fp8"),
        ("auto", "AttentionBackendName.SAGE_HUB", 86, "int8"),
        ("auto", "AttentionBackendName._SAGE_QK_INT8_PV_FP8_CUDA", 90, "int8"),
        ("auto", "AttentionBackendName._SAGE_QK_INT8_PV_FP16_CUDA", 120, "int8"),
        ("auto", "attention_sage", 103, "native"),
        ("auto", "a_node.message_attention", 89, "native"),
        ("auto", "attention_sage", None, "native"),
        ("auto", "attention_comfy_kitchen_int8", 89, "int8"),
        ("native", "attention_sage", 89, "native"),
        ("fp8", "attention_pytorch", 86, "fp8"),
    ],
)
def test_auto_is_as_exact_as_what_the_user_has(wanted, attention, capability, mode):
    chosen = mode_for(wanted, attention, capability)
    assert chosen.mode == mode
    if wanted == "auto":
        assert chosen.why == ("" if mode == "native" else f"as exact as {recognise(attention)}")


def test_what_failed_by_an_error_is_asked_again_in_the_next_run(monkeypatch):
    """Three times, and whoever is first takes over again."""
    first, second = KernelBackend(JitLauncher(), "int8"), Fake("second")
    monkeypatch.setattr(first.launcher, "method", lambda *_: Method(int8=True))
    tries = []

    def problem(backend, trial):
        tries.append(trial)
        if len(tries) < 3:
            raise OSError("a timeout")

    monkeypatch.setattr(kernel_selftest, "problem", problem)
    provider = FirstTrusted([first, second])
    for expected in (second, second, first, first):
        for _ in range(2):
            assert provider.provide(*KIND) is expected
        provider.begin_run()
    assert len(tries) == 3


def test_the_cpu_ignores_the_mode():
    cpu = torch.device("cpu")
    native, int8 = (backends.backend_for(cpu, mode) for mode in ("native", "int8"))
    assert type(native) is type(int8)
