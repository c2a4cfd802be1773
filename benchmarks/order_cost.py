"""What it costs a card to list tokens in another order: ``python -m benchmarks.order_cost``.

Arithmetic from public data sheets; nothing is run. "k and v" is what LiteAttention does: before
each call one pass reads k and v and writes them in the new order, while the kernel itself looks up
the rows of q and out. "All four" adds passes over q and out, for comparison. A kernel could also
gather the rows of k and v while loading them. That would move no more bytes, but it would compute
the address of every row again for every query tile that visits it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from comfyui_liteattention.backends.gpu.kernel_table import TILE

TOKENS = (32760, 75600)  # Wan at 480p and at 720p, 81 frames
HEAD_DIM = 128
BYTES = 2  # per element


class Card(NamedTuple):
    """From NVIDIA's data sheets, per second: dense bf16 operations with float32 sums, and bytes of
    memory bandwidth."""

    name: str
    operations: float
    bytes: float


CARDS = (
    Card("RTX 3060", 25.5e12, 360e9),
    Card("RTX 4090", 165.2e12, 1008e9),
    Card("RTX 5090", 209.5e12, 1792e9),
    Card("A100 (80 GB)", 312e12, 2039e9),
    Card("H100 (SXM)", 989.4e12, 3350e9),
)


def attention_seconds(card: Card, tokens: int, computed: float) -> float:
    """Attention of one head, at the full speed of the matrix units."""
    return 4 * tokens**2 * HEAD_DIM * computed / card.operations


def pass_seconds(card: Card, tokens: int, tensors: int) -> float:
    """Reading and writing so many tensors of one head, at the full memory bandwidth."""
    return tensors * 2 * tokens * HEAD_DIM * BYTES / card.bytes


def visits(tokens: int, computed: float) -> float:
    """How often a row of k is loaded."""
    return computed * TILE.grid(tokens, tokens)[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.order_cost", description=__doc__)
    parser.add_argument("--skipped", type=float, default=0.5, metavar="SHARE")
    computed = 1 - parser.parse_args().skipped
    print(f"passes, % of the attention's time with {computed:.0%} of the tiles computed")
    print(f"{'':14}" + "".join(f"{f'{n} tokens: k and v':>23}{'all four':>10}" for n in TOKENS))
    for card in CARDS:
        shares = [
            pass_seconds(card, n, tensors) / attention_seconds(card, n, computed)
            for n in TOKENS
            for tensors in (2, 4)
        ]
        widths = (23, 10) * len(TOKENS)
        print(
            f"{card.name:14}" + "".join(f"{s:{w}.1%}" for s, w in zip(shares, widths, strict=True))
        )
    times = ", ".join(f"{visits(n, computed):.0f} times at {n} tokens" for n in TOKENS)
    more = 4 / (2 * HEAD_DIM * BYTES)  # an int32 beside a row of k and one of v
    print(f"gathering on load: an address for each row {times}; {more:.1%} more to read each time")


if __name__ == "__main__":
    main()
