"""Number formats that numpy doesn't have: bfloat16, and FP8 with 4 bits of exponent (e4m3)."""

from __future__ import annotations

import numpy as np

#: Largest e4m3 number: 1.75 * 2^8.
LARGEST_E4M3 = np.float32(448)
_NO_E4M3 = 0x7F


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> its upper half, to the nearest, ties to even; not a number: 0x7FFF."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


def from_bfloat16(x: np.ndarray) -> np.ndarray:
    """16 bits -> float32."""
    return (x.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_float16(x: np.ndarray) -> np.ndarray:
    """float32 -> 16 bits in 32; not a number: 0x7FFF."""
    half = x.astype(np.float16).view(np.uint16).astype(np.uint32)
    return np.where(np.isnan(x), np.uint32(0x7FFF), half)


def from_e4m3(x: np.ndarray) -> np.ndarray:
    """8 bits -> float32, exact: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities."""
    return _E4M3[x.view(np.uint8)]


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """float32 -> 8 bits, to the nearest, ties to even; beyond the largest: the largest."""
    size = np.minimum(np.abs(x), LARGEST_E4M3).astype(np.float64)
    exponent = np.maximum(np.floor(np.log2(np.maximum(size, 2.0**-20))), -6)
    steps = np.rint(size * 2.0 ** (3 - exponent))  # np.rint: ties to even
    value = steps * 2.0 ** (exponent - 3)
    code = np.searchsorted(_E4M3[:_NO_E4M3], np.nan_to_num(value).astype(np.float32))
    code = np.where(np.isnan(x), _NO_E4M3, code).astype(np.uint8)
    return np.where(np.signbit(x), code | 0x80, code).astype(np.uint8)


def _table() -> np.ndarray:
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[code & _NO_E4M3 == _NO_E4M3] = np.nan
    return np.where(code >> 7, -size, size).astype(np.float32)


_E4M3 = _table()
