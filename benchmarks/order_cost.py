"""What a card does before the attention: ``python -m benchmarks.order_cost [--skipped SHARE]``.

Arithmetic from public data sheets; nothing is run. A call puts k and v in the order of the tile
map, averages them over the key tiles, and makes q, k and v narrower in the faster modes: so many
bytes to move, which is compared with the attention at the full speed of the matrix units. "Apart":
were order and means passes of their own in those modes, too, as they are where k and v stay as they
come. q and out are looked up by the kernel; passes over them as well would be 8 bytes more.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from comfyui_liteattention.backends.base import Mode
from comfyui_liteattention.backends.gpu.kernel_table import METHODS, Method, Values

TOKENS = (32760, 75600)  # Wan at 480p and at 720p, 81 frames
HEAD_DIM = 128


class Card(NamedTuple):
    """As NVIDIA states them: dense bf16 with float32 sums, and memory bandwidth, per second; how
    many times as fast INT8 is."""

    name: str
    arch: int
    operations: float
    bytes: float
    int8: int


CARDS = (
    Card("RTX 3060", 86, 25.5e12, 360e9, 4),
    Card("RTX 4090", 89, 165.2e12, 1008e9, 4),
    Card("RTX 5090", 120, 209.5e12, 1792e9, 4),
    Card("A100 (80 GB)", 80, 312e12, 2039e9, 2),
    Card("H100 (SXM)", 90, 989.4e12, 3350e9, 2),
)
#: How many times as fast as bf16 p v is.
P_V: dict[Values, int] = {"own": 1, "fp16": 2, "e4m3": 4}

#: Bytes of a number that are read and written: to list k or v in order, and to average it.
ORDER, MEANS = 4, 2
#: For q in 8 bits; for k, with its mean over all tokens; for v, with its largest magnitudes.
INT8_QUERIES, INT8_KEYS = 3, 5
NARROWER_VALUES: dict[Values, int] = {"fp16": 6, "e4m3": 5}


def attention_seconds(card: Card, method: Method, tokens: int, computed: float) -> float:
    """Of one head."""
    product_seconds = 2 * tokens**2 * HEAD_DIM * computed / card.operations
    q_k = 1 / card.int8 if method.int8 else 1
    return product_seconds * (q_k + 1 / P_V[method.values])


def bytes_before(method: Method, apart: bool) -> int:
    """For each token and channel. ``apart``: order and means in passes of their own."""
    separate = ORDER + MEANS
    keys = INT8_KEYS + apart * separate if method.int8 else separate
    narrower = NARROWER_VALUES.get(method.values)
    values = separate if narrower is None else narrower + apart * separate
    return keys + values + method.int8 * INT8_QUERIES


def share(card: Card, method: Method, tokens: int, computed: float, apart: bool) -> float:
    """Time before the attention / time of the attention."""
    before = bytes_before(method, apart) * tokens * HEAD_DIM / card.bytes
    return before / attention_seconds(card, method, tokens, computed)


def rows(computed: float) -> Iterator[tuple[str, Mode, list[float]]]:
    """Card, mode, and for each of :data:`TOKENS` the share as built and with passes apart."""
    for card, mode in product(CARDS, METHODS):
        if (method := METHODS[mode].get(card.arch)) is not None:
            cases = product(TOKENS, (False, True))
            yield card.name, mode, [share(card, method, n, computed, apart) for n, apart in cases]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.order_cost", description=__doc__)
    parser.add_argument("--skipped", type=float, default=0.5, metavar="SHARE")
    computed = 1 - parser.parse_args().skipped
    print(f"% of the attention's time with {computed:.0%} of the tiles computed")
    heads = "".join(f"{f'{n} tokens':>16}{'apart':>8}" for n in TOKENS)
    print(f"{'':14}{'mode':8}{heads}")
    for card, mode, shares in rows(computed):
        widths = (16, 8) * len(TOKENS)
        figures = (f"{part:{width}.1%}" for part, width in zip(shares, widths, strict=True))
        print(f"{card:14}{mode:8}{''.join(figures)}")


if __name__ == "__main__":
    main()
