"""The user's own attention for one call, timed where that is worth knowing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.clock import stopwatch

#: Told how to ask for the seconds that a call took.
Tell = Callable[[Callable[[], float]], None]


class Dense:
    """A call of the user's own attention, made at most once, by whoever was going to make it.

    It may be the last to need ``q, k, v``, and free them on the way. So it is made when nothing of
    ours refers to them any more: a run only says beforehand that it wants to know the time.
    """

    def __init__(self, attend: Callable[[], Tensor]) -> None:
        self._attend = attend
        self._timed: tuple[torch.device, Tell] | None = None

    def time(self, device: torch.device, tell: Tell) -> None:
        """Time the call on this device, and ``tell`` when it has been made."""
        self._timed = device, tell

    def __call__(self) -> Tensor:
        if self._timed is None:
            return self._attend()
        device, tell = self._timed
        stop = stopwatch(device)
        out = self._attend()
        tell(stop())
        return out
