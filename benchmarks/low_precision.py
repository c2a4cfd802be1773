"""How precise are the modes for cards? ``python -m benchmarks.low_precision [--json FILE]``.

The kernel of ``backends/gpu/kernels/attend.py`` in plain PyTorch, key tile by key tile, with q, k,
v, the softmax weights and the sums rounded as each mode does it on an RTX card; beside it PyTorch's
own attention and an emulation of SageAttention2++ (arXiv 2505.21136). The rules:

* native: the relative error (Frobenius) of the output against float64 is at most twice that of
  PyTorch's attention in the dtype of the inputs;
* int8 and fp8: at most that of SageAttention2++.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.demo_video import DEVELOPMENT, DemoVideos, Moment
from benchmarks.record import write_json
from comfyui_liteattention.backends.gpu import qk_int8, scaled_values
from comfyui_liteattention.backends.gpu.kernel_table import LIFT, METHODS, TILE, Method
from comfyui_liteattention.backends.reference import LOG2E

Qkv = tuple[Tensor, Tensor, Tensor]
Rounding = Callable[[Tensor], Tensor]

CASES = (
    *("random", "peaked", "flat", "v in common", "outliers"),
    *("outlying channels", "outlying tokens", "video-like"),
)
HEAD_DIMS = (64, 128)
HEADS, QUERIES, KEYS, SEEDS = 2, 128, 2048, 3
#: The card whose modes are shown: it has all three.
ARCH = 89
#: Of the demo model: layers, and steps of a run of three.
LAYERS, STEPS = ("blocks.0.attn1", "blocks.3.attn1"), (0, 2)


# ---- attention ----------------------------------------------------------------------------------


def half(x: Tensor) -> Tensor:
    return x.half().float()


def own(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def sum_in_fp16(p: Tensor, v: Tensor) -> Tensor:
    """Rounds after 16 keys each."""
    total = torch.zeros(())
    for some, values in zip(p.split(16, -1), v.split(16, -2), strict=True):
        total = half(total + some @ values)
    return total


def attend(s: Tensor, v: Tensor, lift: float, rounding: Rounding) -> Tensor:
    """``s [..., L, Lk]`` in log2, ``v [..., Lk, D]``; p, rounded, is at most ``2^lift``. Sums of a
    tile are in fp16, but for what has 8 bits of exponent."""
    multiply = torch.matmul if rounding is own else sum_in_fp16
    top, total, out = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
    for part, values in zip(s.split(TILE.k, -1), v.split(TILE.k, -2), strict=True):
        before, top = top, torch.maximum(top, part.amax(-1, keepdim=True))
        p, decay = (part - top + lift).exp2(), (before - top).exp2()
        total = total * decay + p.sum(-1, keepdim=True)
        out = out * decay + multiply(rounding(p), values)
    return out / total


def ours(q: Tensor, k: Tensor, v: Tensor, method: Method) -> Tensor:
    """``q [B, H, L, D]``, ``k, v [B, H, Lk, D]`` bf16, Lk a multiple of the tile's keys."""
    scale = q.shape[-1] ** -0.5
    s = _scores_in_int8(q, k, scale) if method.int8 else q.float() @ k.float().mT * scale * LOG2E
    if method.values == "own":
        return attend(s, v.float(), 0, own).to(q.dtype)
    scaled = scaled_values.scale_values(v, method.values, TILE.k)
    in_8_bits = method.values == "e4m3"
    values = scaled.values.float().mT if in_8_bits else scaled.values.float()
    out = attend(s, values, LIFT[method.values], e4m3 if in_8_bits else half)
    return (out * scaled.unit.unsqueeze(2)).to(q.dtype)


def _scores_in_int8(q: Tensor, k: Tensor, scale: float) -> Tensor:
    mean = qk_int8.mean_key(k)
    queries = qk_int8.quantise_queries(q, mean, scale)
    keys = qk_int8.quantise_keys(k, mean, TILE.k)
    left = queries.values.float() * queries.unit.unsqueeze(-1)
    return left @ (keys.values.float() * keys.unit.unsqueeze(-1)).mT


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention2++: INT8 q k with a unit for the rows that a thread holds, keys without their
    mean; e4m3 p up to 448 and v up to 2.25 by channel, so that sums fit fp16."""
    keys = k.float() - k.float().mean(-2, keepdim=True)
    s = _by_thread(q.float(), (4, 8), (-3,)) @ _by_thread(keys, (8, 4, 2), (-2, -4)).mT
    unit = v.float().abs().amax(-2, keepdim=True).clamp(min=1e-12) / 2.25
    scores = s * (q.shape[-1] ** -0.5 * LOG2E)
    return (attend(scores, e4m3(v.float() / unit), math.log2(448), e4m3) * unit).to(q.dtype)


def _by_thread(x: Tensor, rows: tuple[int, ...], over: tuple[int, ...]) -> Tensor:
    groups = x.unflatten(-2, (-1, *rows))
    unit = groups.abs().amax((*over, -1), keepdim=True).clamp(min=1e-12) / 127
    return ((groups / unit).round() * unit).flatten(-2 - len(rows), -2)


def of_mode(mode: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    method = METHODS[mode][ARCH]
    return lambda q, k, v: ours(q, k, v, method)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "PyTorch": scaled_dot_product_attention,
    **{mode: of_mode(mode) for mode in METHODS},
    "SageAttention2++, emulated": sage,
}


# ---- inputs -------------------------------------------------------------------------------------


def synthetic(case: str, head_dim: int, seed: int) -> Qkv:
    """``[1, H, L, D]`` bf16."""
    random = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randn(1, HEADS, length, head_dim, generator=random)

    q, k, v = draw(QUERIES), draw(KEYS), draw(KEYS)
    if case == "peaked":
        q = 4 * q
    if case == "flat":
        q = q / 20
    if case == "v in common":
        v = v + 5 * draw(1)
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
        base, other = (draw(KEYS // 16).repeat_interleave(16, 2) for _ in range(2))
        q, k, v = 1.5 * base[:, :, :QUERIES] + 0.5 * q, base + 0.5 * k, other + 0.6 * v
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def from_the_demo() -> Qkv:
    """Some calls of the demo model, one in the batch each; a sample of the queries."""
    found: list[Qkv] = []

    def attend(at: Moment, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if at.layer in LAYERS and at.step in STEPS and at.stream == "cond":
            found.append((q[:, :, :: q.shape[2] // QUERIES], k, v))
        return scaled_dot_product_attention(q, k, v, scale=scale)

    DemoVideos().through(attend, DEVELOPMENT[0]._replace(steps=max(STEPS) + 1))
    q, k, v = (torch.cat(tensors).bfloat16() for tensors in zip(*found, strict=True))
    return q, k, v


# ---- measuring ----------------------------------------------------------------------------------


def errors(inputs: list[Qkv]) -> dict[str, float]:
    """Relative error of each attention, mean over inputs."""
    found = dict.fromkeys(ATTENTIONS, 0.0)
    for q, k, v in inputs:
        truth = scaled_dot_product_attention(q.double(), k.double(), v.double())
        for name, attention in ATTENTIONS.items():
            off = attention(q, k, v).double() - truth
            found[name] += float(off.norm() / truth.norm()) / len(inputs)
    return found


def holds(found: dict[str, float]) -> dict[str, bool]:
    """Whether the modes keep their rules."""
    theirs = found["SageAttention2++, emulated"]
    native = found["native"] <= 2 * found["PyTorch"]
    return {"native": native} | {mode: found[mode] <= theirs for mode in ("int8", "fp8")}


def drawn(case: str, head_dim: int) -> list[Qkv]:
    return [synthetic(case, head_dim, seed) for seed in range(SEEDS)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.low_precision", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    cases = {(case, d): drawn(case, d) for case, d in product(CASES, HEAD_DIMS)}
    demo = from_the_demo()
    cases["demo model", demo[0].shape[-1]] = [demo]
    print(f"{'inputs, head_dim':28}" + "".join(f"{name:>28}" for name in ATTENTIONS))
    rows: list[dict[str, Any]] = []
    for (case, head_dim), inputs in cases.items():
        found = errors(inputs)
        rows.append({"inputs": case, "head_dim": head_dim, "error": found, "holds": holds(found)})
        print(f"{f'{case}, {head_dim}':28}" + "".join(f"{e:>28.2%}" for e in found.values()))
    for mode in METHODS:
        broken = [f"{row['inputs']} {row['head_dim']}" for row in rows if not row["holds"][mode]]
        print(f"{mode} {'breaks its rule: ' + ', '.join(broken) if broken else 'keeps its rule'}")
    if options.json:
        write_json(options.json, rows=rows)


if __name__ == "__main__":
    main()
