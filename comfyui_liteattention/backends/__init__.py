"""Backends: the mechanism that computes attention over a list of tiles."""

from __future__ import annotations

from functools import lru_cache

import torch

from . import kernel_selftest
from .base import Attended, Backend, Criterion

__all__ = ["Attended", "Backend", "Criterion", "backend_for"]


@lru_cache
def backend_for(device: torch.device) -> Backend | str:
    """The backend for a device, or the reason why there is none.

    A kernel is trusted after its self-test: on the CPU here, on a card for each head_dim and dtype
    when they are first used (``unsupported`` of that backend).
    """
    return _cpu() if device.type == "cpu" else _card(device)


def _cpu() -> Backend | str:
    from .cpu import CpuBackend

    backend = CpuBackend()
    probe = torch.zeros(1, 1, 64, 64)
    reason = backend.unsupported(probe, probe, probe)
    return reason or kernel_selftest.failure(backend, 64, torch.float32, probe.device) or backend


def _card(device: torch.device) -> Backend | str:
    """Prebuilt code first, then the same kernel through triton."""
    from .cuda import CudaBackend
    from .triton import TritonBackend

    reasons = []
    for backend in (CudaBackend(), TritonBackend()):
        reason = backend.unavailable(device)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    return "; ".join(reasons)
