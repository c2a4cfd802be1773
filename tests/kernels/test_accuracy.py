"""The rule for 8 bits: the error is at most that of SageAttention2++ on the same inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from comfyui_liteattention.backends.gpu import qk_int8, scaled_values
from comfyui_liteattention.backends.gpu.kernel_table import LIFT, TILE
from comfyui_liteattention.backends.reference import LOG2E

KEYS, QUERIES, SEEDS = 2048, 128, 3
#: How far the two may be apart where they round alike: single draws differ by as much either way.
CHANCE = 1.03
CASES = (
    *("random", "peaked", "flat", "v in common", "outliers"),
    *("outlying channels", "outlying tokens", "video-like"),
)


def draw(case: str, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``[1, 2, L, D]`` bf16."""
    random = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> Tensor:
        return torch.randn(1, 2, length, d, generator=random)

    q, k, v = tokens(QUERIES), tokens(KEYS), tokens(KEYS)
    if case == "peaked":
        q = 4 * q
    if case == "flat":
        q = q / 20
    if case == "v in common":
        v = v + 5 * tokens(1)
    if case == "outliers":
        k[..., 5] += 20
        v[..., ::16] *= 20
    if case == "outlying channels":
        q[..., 7], k[..., 7] = 12 * q[..., 7], 12 * k[..., 7]
        k[..., 40] += 15
    if case == "outlying tokens":
        k[:, :, ::97] *= 6
        q[:, :, ::13] *= 4
    if case == "video-like":
        base, other = (tokens(KEYS // 16).repeat_interleave(16, 2) for _ in range(2))
        q, k, v = 1.5 * base[:, :, :QUERIES] + 0.5 * q, base + 0.5 * k, other + 0.6 * v
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def in_fp16(p: Tensor, v: Tensor) -> Tensor:
    """Sums rounded after 16 keys each."""
    total = torch.zeros(())
    for some, values in zip(p.split(16, -1), v.split(16, -2), strict=True):
        total = (total + some @ values).half().float()
    return total


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def attend(s: Tensor, v: Tensor, lift: float, rounding) -> Tensor:
    """``s [..., L, Lk]`` in log2, tile by tile; p up to ``2^lift`` is rounded."""
    top, total, out = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
    for part, values in zip(s.split(TILE.k, -1), v.split(TILE.k, -2), strict=True):
        before, top = top, torch.maximum(top, part.amax(-1, keepdim=True))
        p, decay = (part - top + lift).exp2(), (before - top).exp2()
        total = total * decay + p.sum(-1, keepdim=True)
        out = out * decay + in_fp16(rounding(p), values)
    return out / total


def ours(q: Tensor, k: Tensor, v: Tensor, values: str) -> Tensor:
    mean = qk_int8.mean_key(k)
    queries = qk_int8.quantise_queries(q, mean, q.shape[-1] ** -0.5)
    keys = qk_int8.quantise_keys(k, mean, TILE.k)
    k_unit = keys.unit.repeat_interleave(TILE.k, -1).unsqueeze(-1)
    s = (queries.values.float() * queries.unit.unsqueeze(-1)) @ (keys.values.float() * k_unit).mT
    scaled = scaled_values.scale_values(v, values, TILE.k)
    x = scaled.values.float()
    rounding = e4m3 if values == "e4m3" else lambda p: p.half().float()
    out = attend(s, x.mT if values == "e4m3" else x, LIFT[values], rounding)
    return (out * scaled.unit.unsqueeze(2)).bfloat16()


def grouped(x: Tensor, rows: tuple[int, ...], over: tuple[int, ...]) -> Tensor:
    """INT8 with one unit for the rows that one thread of SageAttention's kernel holds."""
    groups = x.unflatten(-2, (-1, *rows))
    unit = groups.abs().amax((*over, -1), keepdim=True).clamp(min=1e-12) / 127
    return ((groups / unit).round() * unit).flatten(-2 - len(rows), -2)


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """INT8 q k by thread, keys without their mean; e4m3 p up to 448 and v up to 2.25 by channel,
    so that sums fit fp16 (arXiv 2505.21136)."""
    keys = k.float() - k.float().mean(-2, keepdim=True)
    s = grouped(q.float(), (4, 8), (-3,)) @ grouped(keys, (8, 4, 2), (-2, -4)).mT
    unit = v.float().abs().amax(-2, keepdim=True).clamp(min=1e-12) / 2.25
    scores = s * (q.shape[-1] ** -0.5 * LOG2E)
    return (attend(scores, e4m3(v.float() / unit), math.log2(448), e4m3) * unit).bfloat16()


def mean_error(method, case: str, d: int) -> float:
    errors = []
    for seed in range(SEEDS):
        q, k, v = draw(case, d, seed)
        truth = scaled_dot_product_attention(q.double(), k.double(), v.double())
        errors.append((method(q, k, v).double() - truth).norm() / truth.norm())
    return torch.stack(errors).mean().item()


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_no_less_precise_than_sage_attention(case, d):
    theirs = mean_error(sage, case, d)
    assert mean_error(lambda *qkv: ours(*qkv, "e4m3"), case, d) <= CHANCE * theirs
    assert mean_error(lambda *qkv: ours(*qkv, "fp16"), case, d) <= theirs
