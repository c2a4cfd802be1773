"""The user's own attention for one call, timed where the run needs its time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.clock import stopwatch

#: Receives a function that gives the seconds that a call took.
Tell = Callable[[Callable[[], float]], None]


class Dense:
    """A call of the user's own attention, made at most once, by the integration and not by the run.

    The attention may be the last to need ``q, k, v`` and free them early. So it is called only when
    nothing of ours refers to them any more; the run asks beforehand for the call to be timed.
    """

    def __init__(self, attend: Callable[[], Tensor]) -> None:
        self._attend = attend
        self._timed: tuple[torch.device, Tell] | None = None

    def time(self, device: torch.device, tell: Tell) -> None:
        """Have the call timed on this device, and the time passed to ``tell``."""
        self._timed = device, tell

    def __call__(self) -> Tensor:
        if self._timed is None:
            return self._attend()
        device, tell = self._timed
        stop = stopwatch(device)
        out = self._attend()
        tell(stop())
        return out
