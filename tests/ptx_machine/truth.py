"""What kernels have to come to, in float64, and how far rounding may take them from it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Attended, Backend, Criterion, Inputs
from comfyui_liteattention.backends.gpu import qk_int8, scaled_values
from comfyui_liteattention.backends.gpu.kernel_table import TILE, Method, Values
from comfyui_liteattention.backends.gpu.low_precision import LowPrecisionReference
from comfyui_liteattention.tiles import TileLists, make_lists
from tests.kernels.running_scores import running_scores

LOG2E = math.log2(math.e)
#: Unit of rounding: half the distance between neighbours at 1.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
#: Rounding of shares, and of sums of 64 products in eights, relative to the sum of magnitudes.
ROUNDED: dict[Values, float] = {"own": 0.0, "fp16": 9 * 2.0**-11, "e4m3": 2.0**-4 + 5 * 2.0**-11}


class Multiplied(NamedTuple):
    """Queries and keys as multiplied, in their order; scores are ``q k^T scale``."""

    q: Tensor
    k: Tensor
    scale: float


def reference(method: Method) -> Backend:
    """The truth of a way to multiply."""
    return LowPrecisionReference(method, TILE)


def wide(call: Inputs, method: Method) -> Inputs:
    """In float64. 8-bit queries and keys have to be the same numbers, hence those of the model's
    dtype."""
    q, k = (call.q, call.k) if method.int8 else (call.q.double(), call.k.double())
    return call._replace(q=q, k=k, v=call.v.double())


def multiplied(call: Inputs, method: Method) -> Multiplied:
    """What the scores are made of."""
    if not method.int8:
        left, right, scale = call.q, call.k, call.scale
    else:
        mean = qk_int8.mean_key(call.k)
        queries = qk_int8.quantise_queries(call.q, mean, call.scale)
        keys = qk_int8.quantise_keys(call.k, mean, TILE.k)
        unit = keys.unit[..., : call.k.shape[2]]
        left = queries.values.double() * queries.unit.double().unsqueeze(-1)
        right, scale = keys.values.double() * unit.double().unsqueeze(-1), math.log(2)
    return Multiplied(left if call.order is None else left[:, :, call.order], right, scale)


def problems_with(
    got: Attended,
    call: Inputs,
    lists: TileLists | None,
    criterion: Criterion | None,
    method: Method,
    rounded_alike: bool = True,
) -> list[str]:
    """What of a result is off by more than rounding allows. ``rounded_alike``: the kernels have
    made the very numbers in 8 bits that the reference has."""
    if got.out.dtype != call.q.dtype or got.out.shape != call.q.shape:
        return [f"out {got.out.dtype} {tuple(got.out.shape)}"]
    want = reference(method).forward(wide(call, method), lists, criterion)
    step = 0.0 if rounded_alike else one_step(call, method)
    problems = _problems_with_out(got, want, call, lists, method, step)
    empty = want.lse == -torch.inf  # rows without any tile
    if not torch.equal(got.lse == -torch.inf, empty):
        problems.append("lse: other rows are empty")
    off = (got.lse.double() - want.lse.double()).abs()[~empty]
    if not (off <= 1e-5 + 3e-6 * want.lse[~empty].abs() + one_step(call, method)).all():
        problems.append(f"lse off by {off.max():.1e}")
    if criterion is None:
        return problems if got.score is None else [*problems, "a score"]
    if got.score is None:
        return [*problems, "no score"]
    return problems + _problems_with_score(got.score.double(), call, lists, criterion, method)


def _values(call: Inputs, method: Method) -> Tensor:
    """As multiplied, in float64."""
    if method.values == "own":
        return call.v.double()
    scaled = scaled_values.scale_values(call.v, method.values, TILE.k)
    return scaled_values.restored(scaled, call.v.shape[2]).double()


def one_step(call: Inputs, method: Method) -> float:
    """What a score changes by at most, natural log, where one number in 8 bits is rounded the other
    way. (Rotations are sums, whose last bit may decide; section ``quantised`` counts those.)"""
    if not method.int8:
        return 0.0
    mean = qk_int8.mean_key(call.k)
    q_unit = qk_int8.quantise_queries(call.q, mean, call.scale).unit.nan_to_num(0, 0)
    k_unit = qk_int8.quantise_keys(call.k, mean, TILE.k).unit.nan_to_num(0, 0)
    return qk_int8.LARGEST * float(q_unit.max() * k_unit.max()) * math.log(2)


def _problems_with_out(
    got: Attended,
    want: Attended,
    call: Inputs,
    lists: TileLists | None,
    method: Method,
    step: float,
) -> list[str]:
    """``step``: what scores may be off by, natural log."""
    dtype = call.q.dtype
    magnitudes = wide(call, method)._replace(v=_values(call, method).abs())
    size = reference(method._replace(values="own")).forward(magnitudes, lists).out.double()
    # Shares are rounded before they are multiplied, the result when it is stored.
    twice = 2 if method.int8 else 1
    shares = max(UNIT[dtype], ROUNDED[method.values]) + 2 * step
    allowed = shares * size * 1.05 + UNIT[dtype] * (twice * want.out.double().abs()) * 1.05 + 1e-5
    # Shares below 2^-14 lose more than their last bit.
    if dtype == torch.float16 or method.values == "e4m3":
        least = 2.0**-18 if method.values == "e4m3" else 2.0**-25
        allowed = allowed + least * call.v.double().abs().sum(2, keepdim=True)
    empty = want.lse == -torch.inf
    problems = []
    if not (got.out[empty] == 0).all():
        problems.append("rows without a tile aren't 0")
    error = (got.out.double() - want.out.double()).abs()[~empty] / allowed[~empty]
    if not (error <= 1).all():
        problems.append(f"out: {error.max():.2f} times what rounding allows")
    return problems


def _problems_with_score(
    score: Tensor, call: Inputs, lists: TileLists | None, criterion: Criterion, method: Method
) -> list[str]:
    q, k, scale = multiplied(call, method)
    tq, tk = TILE.grid(call.q.shape[2], call.k.shape[2])
    every = make_lists(torch.ones(*call.q.shape[:2], tq, tk, dtype=torch.bool))
    twin = running_scores(q, k, scale, lists or every, TILE, criterion)
    visited, problems = twin > -torch.inf, []
    if not (score[~visited] == -torch.inf).all():
        problems.append("a score for a tile that wasn't visited")
    tiny = visited & (twin < -120)  # shares below 2^-126 are 0, whose log2 is minus infinity
    if not (score[tiny] < -119).all():
        problems.append("a tiny score isn't tiny")
    near = visited & ~tiny
    off = (score - twin).abs()[near]
    allowed = 2e-5 + 3e-6 * twin[near].abs() + one_step(call, method) * LOG2E
    if not (off <= allowed).all():
        problems.append(f"score off by {off.max():.1e} log2")
    # The gap is an fma of a number with the same number rounded: up to half of its last bit.
    largest = (q.double() @ k.double().mT).abs().max().item() * scale * LOG2E
    if not (score <= (largest * 2.0**-24 if criterion == "gap" else 0)).all():
        problems.append(f"a score of {score.amax():.1e}, above 0")
    return problems
