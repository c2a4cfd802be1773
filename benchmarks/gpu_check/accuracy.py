"""How far every mode is from float64, beside what the user's own attention is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.reference import ReferenceBackend

from .bench import Bench
from .rivals import RIVALS

KINDS = ("random", "peaked", "video-like", "outliers")
HEADS, QUERIES, KEYS = 2, 512, 4096


def inputs(kind: str, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q [1, H, Lq, D]``, ``k, v [1, H, Lk, D]`` float32, on the CPU, always the same."""
    random = torch.Generator("cpu").manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randn(1, HEADS, length, head_dim, generator=random, device="cpu")

    q, k, v = draw(QUERIES), draw(KEYS), draw(KEYS)
    if kind == "peaked":
        q = 4 * q
    elif kind == "video-like":  # neighbours look alike, keys have much in common
        smooth = draw(KEYS // 64).repeat_interleave(64, 2)
        k, v = smooth + 0.5 * k + 2 * draw(1), smooth + 0.5 * v
        q = smooth[:, :, :: KEYS // QUERIES] + 0.5 * q
    elif kind == "outliers":  # a few channels many times as large, as in real models
        k[..., ::17] *= 8
        v[..., ::31] *= 8
    return q, k, v


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius."""
    return float((got.double().cpu() - want).norm() / want.norm())


def accuracy(bench: Bench) -> dict[str, Any]:
    """Relative error of each mode and of each rival, by dtype and kind of input."""
    rows: list[dict[str, Any]] = []
    for head_dim, dtype in ((128, torch.bfloat16), (128, torch.float16), (64, torch.bfloat16)):
        for kind in KINDS:
            q, k, v = (x.to(dtype) for x in inputs(kind, head_dim))
            truth, scale = ReferenceBackend(dtype=torch.float64), head_dim**-0.5
            want = truth.forward(Inputs(q.double(), k.double(), v.double(), scale)).out
            q, k, v = (x.to(bench.device) for x in (q, k, v))
            there = Inputs(q, k, v, scale)
            case = {"head_dim": head_dim, "dtype": str(dtype).split(".")[1], "inputs": kind}
            errors = {mode: _ours(bench, mode, there, want) for mode in bench.providers}
            rows.append(case | {"error": errors | _theirs(there, want)})
    return {"rows": rows}


def _ours(bench: Bench, mode: str, call: Inputs, want: Tensor) -> float | str:
    backend = bench.backend(mode, call.q.shape[-1], call.q.dtype)
    if isinstance(backend, str):
        return backend
    return relative_error(backend.forward(call).out, want)


def _theirs(call: Inputs, want: Tensor) -> dict[str, float]:
    errors = {}
    for name, function in RIVALS.items():
        try:
            out = function(*call[:3])
        except Exception:  # not installed, or not for these tensors: the speed section says which
            continue
        errors[name] = relative_error(out, want)
    return errors
