"""Nothing waits for the device while a model runs, and once when it has returned.

A stand-in for a card: a mode of PyTorch that counts what would have to wait for one.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.report import outcome
from comfyui_liteattention.run import Run
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape

SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """``count``: values that came to the host, and sizes that depend on values."""

    WAITING = {
        aten._local_scalar_dense.default,
        aten.nonzero.default,
        aten.masked_select.default,
        aten.unique_dim.default,
        aten._unique2.default,
    }

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{"budget": 0.1}, {"threshold": -0.5}])
def test_an_attention_call_waits_for_nothing(settings):
    run = Run(
        Settings(min_tokens=0, audit=4, **settings), ReferenceBackend(TileShape(16, 16)), SIGMAS
    )
    q, k, v = torch.randn(3, 2, 2, 200, 32, generator=torch.Generator().manual_seed(0))
    for step, sigma in enumerate(SIGMAS[:-1]):
        run.begin_call(step)
        with Waits() as waits:
            for layer in range(3):
                run.attend(str(layer), ["u", "c"], run.locate(sigma), Inputs(q, k, v, 0.2))
        assert waits.count == 0
        assert run.end_call(step, 1.0)
    assert any(one.live.min() < 1 for one in run.finish().maps)


def test_all_figures_of_a_model_call_come_in_one_copy(monkeypatch):
    """However many layers there are."""
    copies = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: copies.append(t.shape) or real(t))
    run = Run(Settings(threshold=-3.0, min_tokens=0), ReferenceBackend(TileShape(16, 16)), SIGMAS)
    q, k, v = torch.randn(3, 2, 2, 200, 32, generator=torch.Generator().manual_seed(0))
    for step, sigma in enumerate(SIGMAS[:-1]):
        for layer in range(3):
            run.attend(str(layer), ["u", "c"], run.locate(sigma), Inputs(q, k, v, 0.2))
        del copies[:]
        with Waits() as waits:
            assert run.end_call(step, 1.0)
        assert len(copies) == 1
        assert waits.count == 0
        assert len(run.progress_text(step))
        assert len(copies) == 1


def test_what_is_looked_at_last_is_waited_for_first(monkeypatch):
    """When the last of many moments has passed, all have."""
    asked = []

    def outcome_of(number):
        return outcome.Outcome(
            progress=None,
            layer="",
            streams=("x",),
            tokens=(1,),
            tallies=(outcome.Tally(1, 1, None),),
            seconds=lambda: asked.append(number) or 1.0,
        )._replace(progress=Run(Settings(), ReferenceBackend(), SIGMAS).locate(1.0))

    outcome.look([outcome_of(number) for number in range(4)])
    assert asked == [3, 2, 1, 0]
