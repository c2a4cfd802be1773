"""How long a device works, told without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Starts now. What it returns stops it; what that returns says the seconds in between.

    A card notes both moments when it comes to them: the seconds are known without waiting once its
    later results are.
    """
    if device.type != "cuda":
        started = time.perf_counter()

        def stop_here() -> Callable[[], float]:
            taken = time.perf_counter() - started
            return lambda: taken

        return stop_here
    start = _event(device)

    def stop() -> Callable[[], float]:
        end = _event(device)

        def seconds() -> float:
            if not end.query():
                end.synchronize()
            return start.elapsed_time(end) / 1000

        return seconds

    return stop


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
