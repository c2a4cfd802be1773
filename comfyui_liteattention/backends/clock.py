"""How long a device works, measured without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start timing. Calling the result stops it and returns a function that gives the seconds.

    A card records both moments in its own queue, so asking for the seconds does not wait once
    anything that was queued later is done.
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
