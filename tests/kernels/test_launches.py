"""How much a card is asked to do for one call, beside the attention itself."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton", reason="triton isn't installed, so there is no kernel to interpret")

import interpreted_kernel
from interpreted_kernel import InterpreterBackend, interpret, why_not

from comfyui_liteattention.attention import LayerState, attend
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.gpu.kernel_table import TILE
from comfyui_liteattention.backends.gpu.tile_map import TileMapKernels
from comfyui_liteattention.backends.pooled import audit_skipped
from comfyui_liteattention.plan import Plan
from comfyui_liteattention.report.outcome import extremes
from comfyui_liteattention.schedule import Progress
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.token_order import VideoTokens

pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.filterwarnings("ignore:divide by zero"),
]

MEMORY_ONLY = ("empty", "new_empty", "empty_like", "empty_strided")


class Launches(TorchDispatchMode):
    """Counts operations of torch that would be launches on a card."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in MEMORY_ONLY:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Backend(InterpreterBackend):
    running_scores = True

    def tile_map(self, device):
        return TileMapKernels(lambda launch, _: interpreted_kernel.interpret(launch))


class WithTorch(InterpreterBackend):
    """Of its own kernels only those of attention itself and of the tail."""

    running_scores = True

    def audit_skipped(self, kept, skipped, full, audited):
        return audit_skipped(kept, skipped, full, audited, TILE)


@pytest.fixture
def count(monkeypatch):
    """Counts what a call launches: kernels of ours by name, operations of torch."""
    own = Counter()

    def note(launch):
        own[launch.kernel.entry.name] += 1
        with _disable_current_modes():
            interpret(launch)

    monkeypatch.setattr(interpreted_kernel, "interpret", note)

    def last_call(backend):
        """Of a default run: order, audit, tail, a budget over several layers."""
        torch.manual_seed(0)
        remaining = {}
        layers = [LayerState(name=name, remaining=remaining) for name in "abc"]
        settings, video = Settings(budget=0.03, audit=4), VideoTokens((4, 8, 16))
        plan = Plan(settings, (), known=False)
        launches = Launches()
        for step in range(4):
            for layer in layers:
                rows = [1.5 * torch.randn(1, 512, 2, 64) for _ in range(3)]
                rows = [x.half().transpose(1, 2) for x in rows]
                own.clear()
                launches.counts.clear()
                with launches:
                    position = (step + 1) / 4
                    aim = plan.aim(Progress(step, position))
                    out, _ = attend(
                        layer, backend, Inputs(*rows, 0.125), settings, position, video, aim
                    )
                    extremes(out)
        return own, launches.counts

    return last_call


def test_a_call_launches_little_beside_attention(count):
    own, torchs = count(Backend())
    assert own == {
        "attend_tiles": 1,  # the audit in it
        **dict.fromkeys(("list_tiles", "count_scores", "choose_limit", "mark_tiles"), 1),
        **dict.fromkeys(("audit_skipped", "add_skipped"), 1),
    }
    assert torchs.total() <= 34, torchs
    with_torch = sum(counts.total() for counts in count(WithTorch()))
    assert with_torch > 2 * (8 + 34)
