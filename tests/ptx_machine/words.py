"""Machine words of 1, 2, 4 and 8 bytes, and what memory holds that nobody has written."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Bytes of a word -> its dtype.
WORDS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
#: -> log2 of its bytes.
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3}
#: -> a word of bytes that are all 1.
ONES: dict[int, Any] = {n: word(0x0101010101010101 >> (64 - 8 * n)) for n, word in WORDS.items()}

#: Unwritten memory, little end first: not a number as bf16, fp16, fp32 and fp64.
POISON = np.array([0xA5, 0x7F, 0xB6, 0xFF], np.uint8)
POISON32 = np.uint32(0xFFB67FA5)
POISON64 = np.uint64(0xFFB67FA5FFB67FA5)

#: Addresses carry the number of the parameter they come from in their upper 16 bits.
TAG_SHIFT = np.uint64(48)
ADDRESS = np.uint64((1 << 48) - 1)


def poison(size: int) -> Any:
    """A word of unwritten memory, of so many bytes."""
    return WORDS[size](0xFFB67FA5FFB67FA5 & ((1 << 8 * size) - 1))
