"""Backends: the mechanism that computes attention over a list of tiles."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch

from .base import Provider, Qk
from .cpu.backend import CpuBackend
from .gpu.backend import KernelBackend
from .gpu.first_trusted import FirstTrusted
from .gpu.jit import JitLauncher
from .gpu.prebuilt import process_launcher

__all__ = ["backend_for"]


def backend_for(device: torch.device, qk: Qk = "native") -> Provider | str:
    """What provides the backends for a device during a run, or the reason why there is none.

    ``qk``: how a card multiplies queries and keys; where ``int8`` isn't there, and on the CPU, it
    is ``native`` all the same. A kernel is trusted after its self-test: on the CPU here, on a card
    for each head_dim and dtype when they are first used (``Provider.provide``).
    """
    if device.type == "cpu":
        cpu = _cpu()
        reason = cpu.provide(device, 64, torch.float32)
        return reason if isinstance(reason, str) else cpu
    card = _card(device, qk)
    if not isinstance(card, str):
        card.begin_run()
    return card


@lru_cache
def _cpu() -> CpuBackend:
    return CpuBackend()


@lru_cache
def _card(device: torch.device, qk: Qk) -> FirstTrusted | str:
    """Prebuilt code first, then the same kernel through triton; both in native mode after that."""
    candidates: list[KernelBackend] = []
    reasons = []
    for mode, launcher in product(dict.fromkeys((qk, "native")), (process_launcher, JitLauncher)):
        backend = KernelBackend(launcher(), mode)
        reason = backend.unavailable(device)
        if reason is None:
            candidates.append(backend)
        else:
            reasons.append(f"{backend.name}: {reason}")
    return FirstTrusted(candidates) if candidates else "; ".join(reasons)
