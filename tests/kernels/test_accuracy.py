"""The rules: 16 bits at most twice as far off as PyTorch, INT8 no further than SageAttention2++."""

from __future__ import annotations

import pytest

from benchmarks.low_precision import CASES, HEAD_DIMS, drawn, errors


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("case", CASES)
def test_modes_are_as_precise_as_they_promise(case, head_dim):
    found = errors(drawn(case, head_dim))
    theirs = found["SageAttention2++, emulated"]
    assert found["native"] <= 2 * found["PyTorch"]
    assert found["int8"] <= theirs and found["fp8"] <= theirs
