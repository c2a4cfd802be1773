"""Memory stays flat, over many runs and over enabling and disabling many times."""

import gc
import weakref

import pytest
import torch
from tiny_pipeline import BOLD, make_pipe, run
from tiny_wan import hooks_left

import comfyui_liteattention as lite
from comfyui_liteattention.attention import LayerState
from comfyui_liteattention.integrations.diffusers.session import Session
from comfyui_liteattention.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = (Run, LayerState, Session)
BUDGET = {"budget": 0.2, "min_tokens": 0, "audit": 4, "never_slower": False}


def alive():
    """Tensors there are, their bytes, and objects of ours that hold any."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [one for one in objects if issubclass(type(one), torch.Tensor)]
    held = sum(one.numel() * one.element_size() for one in tensors)
    return len(tensors), held, sum(issubclass(type(one), OURS) for one in objects)


@pytest.mark.parametrize("settings", [BOLD, BUDGET], ids=["threshold", "budget"])
def test_twenty_runs(settings):
    pipe = make_pipe()
    h = lite.enable(pipe, **settings)
    found = []
    for seed in range(20):
        run(pipe, seed=seed, steps=3, callback_on_step_end=h.callback)
        assert h.report().active
        found.append(alive())
    assert found[-1][2] == 1  # the session; no run, and no state of a layer
    # The first runs fill caches: of compiled code, of the token order. Then there is nothing new
    # but the report, which has as many maps each time.
    assert found[2:] == [found[2]] * 18


def test_sixty_times_on_and_off():
    pipe = make_pipe()
    found, sessions = [], []
    for cycle in range(60):
        h = lite.enable(pipe, **(BOLD, BUDGET)[cycle % 2])
        sessions.append(weakref.ref(h._session))
        if cycle % 10 < 2:
            run(pipe, steps=3)
        with lite.enabled(pipe.transformer, threshold=-4):
            pass
        lite.disable(pipe)
        del h
        found.append(alive())
    assert [session() for session in sessions] == [None] * 60
    assert hooks_left(pipe.transformer) == []
    assert found[20:] == [found[20]] * 40
    assert found[-1][2] == 0
