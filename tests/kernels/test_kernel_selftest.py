"""The self-test passes the real kernel and fails broken ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comfyui_liteattention import backends
from comfyui_liteattention.backends.base import Attended
from comfyui_liteattention.backends.gpu.kernel_table import CONFIGS, Method
from comfyui_liteattention.backends.gpu.low_precision import LowPrecisionReference
from comfyui_liteattention.backends.kernel_selftest import NO_MEMORY, Trial, Verdicts, problem
from comfyui_liteattention.backends.pooled import Agreement
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.tiles import TileShape

CPU = torch.device("cpu")
TRIAL = Trial(64, torch.float16, CPU)
each_method = pytest.mark.parametrize("method", [*CONFIGS], ids=[m.name for m in CONFIGS])


class Broken(ReferenceBackend):
    """The reference with one result spoilt."""

    def __init__(self, spoil):
        super().__init__(TileShape(128, 64), torch.float32)
        self.spoil, self.runs = spoil, 0

    def forward(self, *arguments):
        self.runs += 1
        return self.spoil(super().forward(*arguments))


def spoilt(field, change):
    def spoil(result: Attended) -> Attended:
        value = getattr(result, field)
        return result if value is None else result._replace(**{field: change(value)})

    return spoil


def raising(result):
    raise OSError("cc1 not found")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoilt("out", lambda x: x * 1.1), "relative error"),
        (spoilt("out", lambda x: x * torch.nan), "relative error nan"),
        (spoilt("lse", lambda x: x + 0.1), "LSE off"),
        (spoilt("lse", lambda x: x * torch.nan), "LSE off by nan"),
        (spoilt("score", lambda x: x - 1), "too low"),
        (spoilt("score", lambda x: x.fill_(0)), "was not visited"),
        (spoilt("score", lambda x: x * 0 + 1), "too low or above 0"),
        (raising, "OSError: cc1 not found"),
    ],
)
def test_broken_kernels_are_found_once(spoil, reason):
    backend, verdicts = Broken(spoil), Verdicts()
    assert reason in verdicts.of(backend, TRIAL)
    runs = backend.runs
    assert reason in verdicts.of(backend, TRIAL)
    assert backend.runs == runs


class BrokenMeans(ReferenceBackend):
    def __init__(self, broken):
        super().__init__(TileShape(128, 64), torch.float32)
        self.broken = broken

    def forward(self, call, lists=None, criterion=None):
        unordered = self.broken == ("order" if lists is not None else "order of all tiles")
        return super().forward(call._replace(order=None) if unordered else call, lists, criterion)

    def audit_skipped(self, *arguments):
        agreement, power = super().audit_skipped(*arguments)
        return Agreement(agreement, power * 1.2 if self.broken == "audit" else power)

    def add_skipped(self, *arguments):
        if self.broken != "add":
            super().add_skipped(*arguments)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("order", "a tile list, None: relative error"),
        ("order of all tiles", "all tiles, mass: a score"),
        ("audit", "skipped tiles: means agree otherwise"),
        ("add", "skipped tiles: relative error"),
    ],
)
def test_broken_orders_and_means_are_found(broken, reason):
    assert reason in problem(BrokenMeans(broken), TRIAL)
    assert problem(BrokenMeans(None), TRIAL) is None


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


@pytest.fixture
def emptied(monkeypatch):
    """A list that is longer whenever torch's cache is emptied."""
    found = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(True))
    return found


class Full(ReferenceBackend):
    """Lacks memory until torch's cache has been emptied so often."""

    def __init__(self, error, emptied, enough):
        super().__init__(TileShape(128, 64), torch.float32)
        self.error, self.emptied, self.enough = error, emptied, enough

    def forward(self, *arguments):
        if len(self.emptied) < self.enough:
            raise self.error
        return super().forward(*arguments)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_lack_of_memory_is_no_verdict(error, emptied):
    backend, verdicts = Full(error, emptied, 3), Verdicts()
    asked = [verdicts.of(backend, TRIAL) for _ in range(4)]
    assert asked == [NO_MEMORY, NO_MEMORY, None, None]
    assert len(emptied) == 3, "once each time, and no more when there is a verdict"


def test_what_torch_has_set_aside_is_room_enough(emptied):
    backend = Full(FULL[0], emptied, 1)
    assert Verdicts().of(backend, TRIAL) is None


@each_method
def test_the_real_kernel_passes(method):
    pytest.importorskip("triton", reason="triton isn't installed, so there is no kernel to run")
    from interpreted_kernel import InterpreterBackend, why_not

    if reason := why_not():
        pytest.skip(reason)
    assert problem(InterpreterBackend(method), Trial(64, torch.bfloat16, CPU, method)) is None


@pytest.fixture
def other_default():
    """Scripts make the card torch's default device; any but the CPU will do here."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@each_method
def test_the_default_device_does_not_matter(other_default, method):
    backend = LowPrecisionReference(method, TileShape(128, 64))
    assert problem(backend, Trial(64, torch.bfloat16, CPU, method)) is None


def test_nor_for_the_choice_on_the_cpu(other_default):
    pytest.importorskip("numba", reason="numba isn't installed, so there is no kernel to choose")
    backends._cpu.cache_clear()
    assert not isinstance(backends.backend_for(CPU), str)


def test_int8_is_held_to_its_own_truth():
    """Closely: plain attention is too far from it to pass."""
    plain = ReferenceBackend(TileShape(128, 64), torch.float32)
    assert problem(plain, TRIAL) is None
    int8 = replace(TRIAL, method=Method(int8=True))
    assert "relative error" in problem(plain, int8)
