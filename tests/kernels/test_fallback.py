"""Which of several ways to run the kernel is taken, and what users hear about it."""

from __future__ import annotations

import pytest
import torch

from comfyui_liteattention import backends
from comfyui_liteattention.backends.gpu import jit, prebuilt
from comfyui_liteattention.backends.gpu.first_trusted import FirstTrusted
from comfyui_liteattention.backends.kernel_selftest import NO_MEMORY
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import TileShape

TILE = TileShape(128, 64)
CARD = torch.device("cuda", 0)


class Fake(ReferenceBackend):
    """A candidate with the reference's numbers; ``untrusted`` names the head_dims that fail."""

    def __init__(self, name, fails=(), has_map=False):
        super().__init__(TILE)
        self.name, self.fails, self.has_map, self.tests = name, fails, has_map, 0

    def untrusted(self, number, head_dim, dtype):
        self.tests += 1
        return "self-test failed" if head_dim in self.fails else None

    def tile_map(self, device):
        return self.name if self.has_map else None


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    choose = backends._card
    choose.cache_clear()
    yield
    choose.cache_clear()


def draw(d=64, dtype=torch.float16):
    return tuple(torch.randn(1, 1, 130, d).to(dtype) for _ in range(3))


def test_the_first_is_taken_and_no_other_is_tested(caplog):
    first, second = Fake("first"), Fake("second")
    backend = FirstTrusted([first, second])
    assert backend.name == "first" and backend.tile_shape(64) == TILE
    assert backend.unsupported(*draw()) is None
    backend.forward(*draw(), 0.1)
    assert (first.tests, second.tests, backend.name) == (1, 0, "first")
    assert not caplog.records


def test_a_failed_self_test_leads_to_the_next_and_is_said_once(caplog):
    backend = FirstTrusted([Fake("first", (64,)), Fake("second")])
    for _ in range(3):
        assert backend.unsupported(*draw()) is None
        assert backend.forward(*draw(), 0.1).out.isfinite().all()
    assert backend.name == "second"
    assert [r.getMessage() for r in caplog.records] == [
        "LiteAttention uses second: first: self-test failed"
    ]
    backend.unsupported(*draw(d=128))
    assert backend.name == "first and second", "the first is fine at another head_dim"


def test_where_all_fail_every_reason_is_given():
    backend = FirstTrusted([Fake("first", (64,)), Fake("second", (64,))])
    want = "first: self-test failed; second: self-test failed"
    assert backend.unsupported(*draw()) == want
    with pytest.raises(RuntimeError, match=want):
        backend.forward(*draw(), 0.1)


def test_a_lack_of_memory_stays_for_a_run_and_leads_to_no_other(monkeypatch):
    first, second = Fake("first"), Fake("second")
    full = [NO_MEMORY]
    first.untrusted = lambda *_: full.pop() if full else None
    backend = FirstTrusted([first, second])
    monkeypatch.setattr(backends, "_card", lambda device, qk: backend)
    for _ in range(2):
        assert backend.unsupported(*draw()) == NO_MEMORY
    assert backends.backend_for(CARD).unsupported(*draw()) is None
    assert backend.name == "first" and second.tests == 0


def test_what_the_kernel_cannot_take_is_not_tested():
    first = Fake("first")
    assert "float32" in FirstTrusted([first]).unsupported(*draw(dtype=torch.float32))
    assert first.tests == 0


def test_the_first_tile_map_is_taken():
    assert FirstTrusted([Fake("a"), Fake("b", has_map=True)]).tile_map(CARD) == "b"
    assert FirstTrusted([Fake("a")]).tile_map(CARD) is None


@pytest.mark.parametrize(
    "qk, missing, names",
    [
        ("native", (), ["cuda", "triton"]),
        ("native", ("cuda",), ["triton"]),
        ("int8", (), ["cuda, int8", "triton, int8", "cuda", "triton"]),
        ("int8", ("cuda, int8", "triton, int8"), ["cuda", "triton"]),
    ],
)
def test_order_of_the_candidates(monkeypatch, qk, missing, names):
    def unavailable(self, device):
        return "not here" if self.name in missing else None

    for kind in (prebuilt.CudaBackend, jit.TritonBackend):
        monkeypatch.setattr(kind, "unavailable", unavailable)
    backend = backends._card(CARD, qk)
    assert [c.name for c in backend._candidates] == names


def test_no_candidate_is_a_reason(monkeypatch):
    for kind in (prebuilt.CudaBackend, jit.TritonBackend):
        monkeypatch.setattr(kind, "unavailable", lambda self, device: "not here")
    assert backends._card(CARD, "native") == "cuda: not here; triton: not here"


def test_the_cpu_ignores_the_mode():
    cpu = torch.device("cpu")
    native, int8 = (backends.backend_for(cpu, qk) for qk in ("native", "int8"))
    assert type(native) is type(int8)
