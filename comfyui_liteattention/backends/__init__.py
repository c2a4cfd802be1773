"""Backends: the mechanism that computes attention over a list of tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product

import torch

from .base import Criterion, Provider
from .cpu.backend import CpuBackend
from .gpu import launch
from .gpu.backend import KernelBackend, Launcher
from .gpu.first_trusted import FirstTrusted
from .gpu.jit import JitLauncher
from .gpu.prebuilt import process_launcher
from .modes import Chosen, Wanted, and_more_exact, mode_for

__all__ = ["backend_for", "capability"]


def backend_for(
    device: torch.device,
    mode: Wanted = "auto",
    attention: str = "",
    criterion: Criterion = "mass",
) -> Provider | str:
    """What provides the backends for a device during a run, or the reason why there is none.

    ``mode``: how a card multiplies, and ``attention``, what attends where we don't, by its name:
    see :func:`.modes.mode_for`; where the mode isn't there, the next more exact one is taken,
    and the CPU has ``native`` alone. A kernel is trusted after its self-test: on the CPU here, on a
    card for each head_dim and dtype when they are first used (``Provider.provide``).
    """
    if device.type == "cpu":
        cpu = _cpu()
        reason = cpu.provide(device, 64, torch.float32)
        return reason if isinstance(reason, str) else cpu
    card = _card(device, mode_for(mode, attention, capability(device)), criterion)
    if not isinstance(card, str):
        card.begin_run()
    return card


@lru_cache
def _cpu() -> CpuBackend:
    return CpuBackend()


def capability(device: torch.device) -> int | None:
    """The compute capability of an NVIDIA card, major * 10 + minor, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return launch.capability(device)


@lru_cache
def _card(device: torch.device, chosen: Chosen, criterion: Criterion) -> FirstTrusted | str:
    """Prebuilt code first, then the same kernel through triton; after that both in the modes that
    are more exact."""
    candidates: list[KernelBackend] = []
    reasons = []
    launchers: tuple[Callable[[], Launcher], ...] = (process_launcher, JitLauncher)
    for (mode, why), launcher in product(and_more_exact(chosen), launchers):
        backend = KernelBackend(launcher(), mode, why)
        reason = backend.unavailable(device, criterion)
        if reason is None:
            candidates.append(backend)
        else:
            reasons.append(f"{backend.name}: {reason}")
    return FirstTrusted(candidates) if candidates else "; ".join(reasons)
