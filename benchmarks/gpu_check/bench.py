"""What the sections share: a device, the backends on it, the time that is left, a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, get_args

import torch

from comfyui_liteattention.backends import backend_for
from comfyui_liteattention.backends.base import Backend, Mode, Provider
from comfyui_liteattention.backends.gpu.backend import KernelBackend
from comfyui_liteattention.backends.gpu.jit import JitLauncher
from comfyui_liteattention.backends.gpu.prebuilt import process_launcher
from demo.model import LATENT_SHAPE

Call: TypeAlias = Callable[[], object]
#: Cycles, some 10 ms, in which the host queues what is timed.
HEAD_START = 20_000_000
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Bench:
    """``providers``: mode -> what provides its backend, or why there is none. ``deadline``: of
    ``clock``, after which sections leave out what they have not begun."""

    device: torch.device
    providers: Mapping[str, Provider | str]
    deadline: float
    tokens: tuple[int, ...] = (32_768, 75_600)
    heads: int = 12
    steps: int = 20
    latent: tuple[int, ...] = LATENT_SHAPE
    clock: Callable[[], float] = field(default=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - self.clock()

    def backend(self, mode: str, head_dim: int, dtype: torch.dtype) -> Backend | str:
        """The backend of a mode, or why none is trusted."""
        provider = self.providers[mode]
        if isinstance(provider, str):
            return provider
        return provider.provide(self.device, head_dim, dtype)

    def milliseconds(self, calls: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        """Each call ``repeats`` times, taking turns, after an untimed round: the device's time."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(repeats + 1):
            for name, call in calls.items():
                taken = _on_card(call) if self.device.type == "cuda" else self._here(call)
                if repeat:
                    times[name].append(taken)
        return times

    def _here(self, call: Call) -> float:
        start = self.clock()
        call()
        return 1000 * (self.clock() - start)


def _on_card(call: Call) -> float:
    """The card is busy with something else until the host has queued the call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def providers_on(device: torch.device) -> dict[str, Provider | str]:
    """Every mode, without what a run would fall back to; where prebuilt code isn't trusted, as
    compiled by triton, too. The CPU has one mode, which stands in for a card's."""
    if device.type == "cpu":
        return {"native": backend_for(device)}
    found: dict[str, Provider | str] = {}
    for mode in MODES:
        found[mode] = prebuilt = _available(KernelBackend(process_launcher(), mode), device)
        trusted = not isinstance(prebuilt, str) and prebuilt.provide(device, 128, torch.bfloat16)
        compiled = _available(KernelBackend(JitLauncher(), mode), device)
        if (not trusted or isinstance(trusted, str)) and not isinstance(compiled, str):
            found[f"{mode} by triton"] = compiled
    return found


def _available(backend: KernelBackend, device: torch.device) -> Provider | str:
    """The backend, or why this card has none of its kernels."""
    return backend.unavailable(device, "mass") or backend


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Our time / theirs: the median over pairs of calls that took turns."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def in_words(error: BaseException) -> dict[str, Any]:
    """What a section that failed leaves."""
    return {"failed": f"{type(error).__name__}: {error}"}
