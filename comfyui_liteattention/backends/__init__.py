"""Backends: the mechanism that computes attention over a list of tiles."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING

import torch

from . import kernel_selftest
from .base import Attended, Backend, Criterion, Qk

if TYPE_CHECKING:
    from .gpu.first_trusted import FirstTrusted

__all__ = ["Attended", "Backend", "Criterion", "Qk", "backend_for"]


def backend_for(device: torch.device, qk: Qk = "native") -> Backend | str:
    """The backend for a device at the start of a run, or the reason why there is none.

    ``qk``: how a card multiplies queries and keys; where ``int8`` isn't there, and on the CPU, it
    is ``native`` all the same. A kernel is trusted after its self-test: on the CPU here, on a card
    for each head_dim and dtype when they are first used (``unsupported`` of that backend).
    """
    if device.type == "cpu":
        return _cpu()
    backend = _card(device, qk)
    if not isinstance(backend, str):
        backend.begin_run()
    return backend


@lru_cache
def _cpu() -> Backend | str:
    from .cpu.backend import CpuBackend

    backend = CpuBackend()
    probe = torch.zeros(1, 1, 64, 64, device="cpu")
    reason = backend.unsupported(probe, probe, probe)
    return reason or kernel_selftest.failure(backend, 64, torch.float32, probe.device) or backend


@lru_cache
def _card(device: torch.device, qk: Qk) -> FirstTrusted | str:
    """Prebuilt code first, then the same kernel through triton; both in native mode after that."""
    from .gpu.first_trusted import Candidate, FirstTrusted
    from .gpu.jit import TritonBackend
    from .gpu.prebuilt import CudaBackend

    candidates: list[Candidate] = []
    reasons = []
    for mode, kind in product(dict.fromkeys((qk, "native")), (CudaBackend, TritonBackend)):
        backend = kind(mode)
        reason = backend.unavailable(device)
        if reason is None:
            candidates.append(backend)
        else:
            reasons.append(f"{backend.name}: {reason}")
    return FirstTrusted(candidates) if candidates else "; ".join(reasons)
