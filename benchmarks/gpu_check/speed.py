"""How fast the kernels are, against whatever else is installed.

"dense", "0%", "25%", ...: the kernel alone; "0%" reads a list that names every tile and writes the
mass scores, "dense" does neither. "0% whole", ...: what a user gets, a call of a run with the
default preset and a map in which so many tiles are skipped: putting k and v in order, lists,
kernel, scores, audit, tail, the next map.
"""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Backend, Inputs, Provider
from comfyui_liteattention.presets import DEFAULT, preset
from comfyui_liteattention.run import Run
from comfyui_liteattention.schedule import Progress
from comfyui_liteattention.tiles import make_lists, pack
from comfyui_liteattention.token_order import Grid, VideoTokens

from .bench import Bench, Call, ratio
from .rivals import working

SKIPPED = (0.0, 0.25, 0.5, 0.75, 0.9)
HEAD_DIM = 128
MOST_REPEATS = 10


def speed(bench: Bench) -> dict[str, Any]:
    """Rows by tokens and mode, as far as the time goes."""
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for tokens in bench.tokens:
        # So that a random mask and its sorting fit beside the tensors.
        shape = (1, tokens, bench.heads, HEAD_DIM)
        q, k, v = (
            torch.randn(shape, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )
        theirs, reasons = working(q, k, v)
        left_out |= reasons
        for mode in bench.providers:
            backend, provider = bench.backend(mode, HEAD_DIM, torch.bfloat16), bench.providers[mode]
            if isinstance(backend, str) or isinstance(provider, str):
                left_out[f"{mode}, {tokens} tokens"] = str(backend)
            elif bench.left <= 0:
                left_out[f"{mode}, {tokens} tokens"] = "no time left"
            else:
                call = Inputs(q, k, v, HEAD_DIM**-0.5)
                ours = our_calls(backend, provider, call)
                rows += [{"mode": mode} | row for row in _measure(bench, call, ours, theirs)]
    return {"rows": rows, "left_out": left_out}


def _measure(
    bench: Bench,
    call: Inputs,
    ours: tuple[dict[str, Call], dict[str, float]],
    theirs: dict[str, Call],
) -> list[dict[str, Any]]:
    """One row for dense, two for each share skipped, one for each rival."""
    calls, computed = ours
    begun = bench.clock()
    bench.milliseconds(theirs | calls, 0)
    once = max(bench.clock() - begun, 1e-6)
    # Half of what is left, so that the next one has some as well.
    repeats = max(1, min(MOST_REPEATS, int(bench.left / 2 / once)))
    times = bench.milliseconds(theirs | calls, repeats)
    _, heads, tokens, head_dim = call.q.shape
    # Two matrix products, two operations for each multiply-add.
    tera = 4 * heads * tokens**2 * head_dim * 1e-12
    rows = []
    for name, taken in times.items():
        median, share = statistics.median(taken), computed.get(name, 1.0)
        row = {"tokens": tokens, "call": name, "repeats": repeats, "ms": median, "computed": share}
        row["tflops"] = tera * share / (median / 1000)
        row["of_dense"] = ratio(taken, times["dense"])
        row["ratio"] = {other: ratio(taken, times[other]) for other in theirs}
        rows.append(row)
    return rows


def our_calls(
    backend: Backend, provider: Provider, call: Inputs
) -> tuple[dict[str, Call], dict[str, float]]:
    """Dense, then the kernel and a whole call at each share skipped; and the share of the tiles
    that each computes."""
    calls: dict[str, Call] = {"dense": partial(backend.forward, call)}
    computed = {"dense": 1.0}
    for skipped in SKIPPED:
        live, share = random_live(backend, call.q, skipped)
        name = f"{skipped:.0%}"
        calls[name] = partial(backend.forward, call, make_lists(live), "mass")
        calls[f"{name} whole"] = whole_call(provider, call, live)
        computed |= {name: share, f"{name} whole": share}
    return calls, computed


def random_live(backend: Backend, q: Tensor, skipped: float) -> tuple[Tensor, float]:
    """As many random tiles in every row, ``[B, H, Tq, Tk]`` bool; also the share that they are."""
    tq, tk = backend.tile_shape(q.shape[-1]).grid(q.shape[2], q.shape[2])
    live = max(1, round(tk * (1 - skipped)))
    order = torch.rand(*q.shape[:2], tq, tk, device=q.device).argsort(-1)
    return order < live, live / tk


def whole_call(provider: Provider, call: Inputs, live: Tensor) -> Call:
    """A layer's call in the middle of a run with the default preset, always with this map."""
    run = Run(preset(DEFAULT), provider, range(10, -1, -1))
    video, bits = VideoTokens(grid_of(call.q.shape[2])), pack(live)

    def again() -> Tensor:
        for layer in run._states.named():
            assert layer.state.live is not None
            layer.state.live.copy_(bits)  # else it would be what the last call made of it
        out = run.attend("layer", ["positive"], Progress(4, 0.5), call, video)
        assert out is not None, f"the run went on densely: {run.report().reasons}"
        return out

    again()  # dense, as there is no map yet
    return again


def grid_of(tokens: int) -> Grid:
    """A video of so many tokens, as near to a cube as their number allows."""

    def divisor(number: int, at_most: int) -> int:
        return next(d for d in range(at_most, 0, -1) if number % d == 0)

    frames = divisor(tokens, round(tokens ** (1 / 3)))
    rows = divisor(tokens // frames, math.isqrt(tokens // frames))
    return frames, rows, tokens // frames // rows
