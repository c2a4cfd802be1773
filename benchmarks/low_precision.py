"""Would p v in 8 bits be precise enough? ``python -m benchmarks.low_precision``, two minutes.

The kernel of ``backends/gpu/kernels/attend.py`` in plain PyTorch, key tile by key tile, with the
softmax weights p (over the row's running maximum, so in 0..1) and the values v rounded to what a
card's matrix instructions would take. Sums are in float32, but for one variant; a card does no
better.

The rule: the relative error (Frobenius) of the output against float64 is at most twice that of
torch's own attention in the dtype of the inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.demo_video import DEVELOPMENT, DemoVideos, Moment
from benchmarks.record import write_json
from comfyui_liteattention.backends.base import Inputs
from comfyui_liteattention.backends.gpu.kernel_table import TILE
from comfyui_liteattention.backends.gpu.qk_int8 import Int8Reference
from comfyui_liteattention.backends.reference import LOG2E

Qkv = tuple[Tensor, Tensor, Tensor]
Rounding = Callable[[Tensor], Tensor]

ALLOWED = 2.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CASES = ("random", "peaked", "flat", "v in common", "outliers")
HEAD_DIMS = (64, 128)
HEADS, QUERIES, KEYS = 2, 128, 2048
#: Of the demo model: layers, and steps of a run of three.
LAYERS, STEPS = ("blocks.0.attn1", "blocks.3.attn1"), (0, 2)

#: What shares a unit: of v ``[..., tiles, keys, D]`` and of p ``[..., queries, keys]``.
CHANNEL, CHANNEL_OF_TILE, WHOLE_TILE = (-3, -2), (-2,), (-2, -1)
ROW_OF_TILE = (-1,)


# ---- roundings ----------------------------------------------------------------------------------


def to(dtype: torch.dtype) -> Rounding:
    return lambda x: x.to(dtype).float()


def scaled(grid: Rounding, largest: float, over: tuple[int, ...] = ()) -> Rounding:
    """Rounds to a grid that ends at ``largest``, which the largest magnitude ``over`` some
    dimensions is mapped to; or 1 is."""

    def rounding(x: Tensor) -> Tensor:
        top = x.abs().amax(over, keepdim=True).clamp(min=1e-12) if over else torch.ones(())
        unit = top / largest
        return grid(x / unit) * unit

    return rounding


int8 = partial(scaled, torch.round, 127)
e4m3 = partial(scaled, to(torch.float8_e4m3fn), 448)
e5m2 = partial(scaled, to(torch.float8_e5m2), 57344)


def sum_in_fp32(p: Tensor, v: Tensor) -> Tensor:
    return p @ v


def sum_in_fp16(p: Tensor, v: Tensor) -> Tensor:
    """Rounds after 8 keys each; the matrix instruction takes 16, and may do so once."""
    total = torch.zeros(())
    for some, values in zip(p.split(8, -1), v.split(8, -2), strict=True):
        total = (total + some @ values).half().float()
    return total


# ---- attention ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """Attention with p and v multiplied in one way. ``centred``: v without its mean, which is
    added at the end (SageAttention2, arXiv 2411.10958)."""

    p: Rounding
    v: Rounding
    centred: bool = False
    multiply: Callable[[Tensor, Tensor], Tensor] = sum_in_fp32

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q [..., L, D]``, ``k, v [..., Lk, D]``, Lk a multiple of the tile's rows."""
        dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
        q = q * (q.shape[-1] ** -0.5 * LOG2E)
        mean = v.mean(-2, keepdim=True) if self.centred else torch.zeros(())
        values = self.v((v - mean).unflatten(-2, (-1, TILE.k))).unbind(-3)
        top, total, out = torch.tensor(-torch.inf), torch.zeros(()), torch.zeros(())
        for keys, part in zip(k.split(TILE.k, -2), values, strict=True):
            s = q @ keys.mT
            before, top = top, torch.maximum(top, s.amax(-1, keepdim=True))
            p, decay = (s - top).exp2(), (before - top).exp2()
            total = total * decay + p.sum(-1, keepdim=True)
            out = out * decay + self.multiply(self.p(p), part)
        return (out / total + mean).to(dtype)


def variants(dtype: torch.dtype) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    own, half = to(dtype), to(torch.float16)
    fine_p, fine_v = int8(over=ROW_OF_TILE), int8(over=CHANNEL_OF_TILE)
    return {
        "the kernel as it is": Variant(own, own),
        "the kernel's INT8 q k": qk_int8,
        "e4m3 p, e4m3 v": Variant(e4m3(), e4m3(over=CHANNEL)),
        "e4m3 p, e4m3 v - mean": Variant(e4m3(), e4m3(over=CHANNEL), centred=True),
        "e5m2 p, e5m2 v - mean": Variant(e5m2(), e5m2(over=CHANNEL), centred=True),
        "e4m3 p, v as it is": Variant(e4m3(), own),
        "p as it is, e4m3 v - mean": Variant(own, e4m3(over=CHANNEL), centred=True),
        "INT8 p, INT8 v by channel": Variant(int8(), int8(over=CHANNEL)),
        "INT8 p, INT8 v by channel - mean": Variant(int8(), int8(over=CHANNEL), centred=True),
        "INT8 p, INT8 v by tile - mean": Variant(int8(), int8(over=WHOLE_TILE), centred=True),
        "finest INT8 p, finest INT8 v - mean": Variant(fine_p, fine_v, centred=True),
        "finest INT8 p, v as it is": Variant(fine_p, own),
        "p as it is, finest INT8 v - mean": Variant(own, fine_v, centred=True),
        "fp16 p, fp16 v, fp16 sums": Variant(half, half, multiply=sum_in_fp16),
    }


def qk_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Int8Reference(TILE, torch.float32).forward(Inputs(q, k, v, q.shape[-1] ** -0.5)).out


# ---- inputs -------------------------------------------------------------------------------------


def synthetic(case: str, head_dim: int) -> Qkv:
    """``[1, H, L, D]`` float32."""
    random = torch.Generator().manual_seed(0)

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
    return q, k, v


def from_the_demo() -> Qkv:
    """Some calls of the demo model, one in the batch each; a sample of the queries."""
    found: list[Qkv] = []

    def attend(at: Moment, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if at.layer in LAYERS and at.step in STEPS and at.stream == "cond":
            found.append((q[:, :, :: q.shape[2] // QUERIES], k, v))
        return scaled_dot_product_attention(q, k, v, scale=scale)

    DemoVideos().through(attend, DEVELOPMENT[0]._replace(steps=max(STEPS) + 1))
    q, k, v = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    return q, k, v


# ---- measuring ----------------------------------------------------------------------------------


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def measure(inputs: Qkv, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Error of each variant, and that over the error of torch's attention."""
    # Rounded to bf16 first: the same numbers in either dtype.
    q, k, v = (x.bfloat16().to(dtype) for x in inputs)
    truth = scaled_dot_product_attention(q.double(), k.double(), v.double())
    plain = relative_error(scaled_dot_product_attention(q, k, v), truth)
    found = {"torch": {"error": plain, "ratio": 1.0}}
    for name, variant in variants(dtype).items():
        error = relative_error(variant(q, k, v), truth)
        found[name] = {"error": error, "ratio": error / plain}
    return found


def show(rows: list[dict[str, Any]], dtype: str, head_dim: int) -> None:
    """A line for each variant, a column for each case."""
    rows = [row for row in rows if (row["dtype"], row["head_dim"]) == (dtype, head_dim)]
    cells = {(row["variant"], row["case"]): row for row in rows}
    names, cases = (list(dict.fromkeys(row[key] for row in rows)) for key in ("variant", "case"))
    title = f"{dtype}, head_dim {head_dim}: error (times torch's)"
    print(f"\n{title:44}" + "".join(f"{case:>16}" for case in cases))
    for name in names:
        line = [cells[name, case] for case in cases]
        texts = [f"{row['error']:.2%} ({row['ratio']:.1f})" for row in line]
        print(f"{name:44}" + "".join(f"{text:>16}" for text in texts))


def worst(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each variant and dtype: its error over torch's in the case where that is largest."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        of_variant = found.setdefault(row["variant"], dict.fromkeys(DTYPES, 0.0))
        of_variant[row["dtype"]] = max(of_variant[row["dtype"]], row["ratio"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.low_precision", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    cases = {(name, d): synthetic(name, d) for name, d in product(CASES, HEAD_DIMS)}
    demo = from_the_demo()
    cases["demo model", demo[0].shape[-1]] = demo
    rows = [
        {"dtype": name, "case": case, "head_dim": head_dim, "variant": variant} | found
        for name, dtype in DTYPES.items()
        for (case, head_dim), inputs in cases.items()
        for variant, found in measure(inputs, dtype).items()
    ]
    for dtype, head_dim in product(DTYPES, HEAD_DIMS):
        show(rows, dtype, head_dim)
    title = f"worst case, times torch's; the rule allows {ALLOWED:.0f}"
    print(f"\n{title:44}" + "".join(f"{dtype:>16}" for dtype in DTYPES))
    for name, ratios in worst(rows).items():
        print(f"{name:44}" + "".join(f"{ratios[dtype]:>16.2f}" for dtype in DTYPES))
    if options.json:
        write_json(options.json, worst=worst(rows), rows=rows)


if __name__ == "__main__":
    main()
