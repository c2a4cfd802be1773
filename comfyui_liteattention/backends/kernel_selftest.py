"""Whether a kernel computes the right thing on this card: a small problem against the reference.

No kernel is trusted before it has passed; one that fails stays off, with the reason. Only a lack of
memory is no verdict: a kernel may be needed first when a model fills the card.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..tiles import make_lists, pack
from .base import Attended, Backend, Inputs, Qk, Skipped, rows_of
from .gpu.qk_int8 import Int8Reference
from .pooled import pool
from .reference import ReferenceBackend

#: Largest relative error (Frobenius norm) of the output; plain attention stays below a third of it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LSE_TOLERANCE = 1e-2
SCORE_TOLERANCE = 0.05  # log2
_HEADS, _QUERIES, _KEYS = 2, 300, 470

NO_MEMORY = "not enough memory to test the kernel on this device: tried again at the next run"


class Verdicts:
    """Results of the self-tests of one backend: one for each card, head_dim and dtype."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int, torch.dtype], str | None] = {}
        self._testing = threading.Lock()

    def of(
        self,
        backend: Backend,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        qk: Qk = "native",
    ) -> str | None:
        """Why the backend isn't trusted with this, or None. The first call runs the test, and each
        one after a lack of memory."""
        key = (str(device), head_dim, dtype)
        if key not in self._found:  # each call of attention asks: only a test is waited for
            with self._testing:
                if key not in self._found:
                    reason = failure(backend, head_dim, dtype, device, qk)
                    if reason == NO_MEMORY:
                        return reason
                    self._found[key] = reason
        return self._found[key]


def failure(
    backend: Backend,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    qk: Qk = "native",
) -> str | None:
    """Why the backend isn't trusted with this, or None; never raises."""
    try:
        return with_room(partial(problem, backend, head_dim, dtype, device, qk))
    # Whatever a driver or a compiler throws: the kernel isn't trusted, and the user sees why.
    except Exception as error:
        if lacks_memory(error):
            return NO_MEMORY
        return f"self-test failed: {type(error).__name__}: {error}"


def with_room(test: Callable[[], str | None]) -> str | None:
    """A test's result; where memory was lacking, of a second try without what torch has set aside
    and doesn't use, because a driver that loads a kernel can't use it either."""
    try:
        return test()
    except Exception as error:
        if not lacks_memory(error):
            raise
    torch.cuda.empty_cache()
    return test()


def lacks_memory(error: Exception) -> bool:
    """Whether a device was out of memory: torch, the driver and triton each have their own errors,
    and the words in common."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def problem(
    backend: Backend,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    qk: Qk = "native",
) -> str | None:
    """What is wrong with the backend's results for this head_dim and dtype, or None.

    Ragged ends, tokens-first layout, all tiles and a list that skips some, queries as they come and
    in an order of their own, each criterion; what skipped tiles contribute.
    """
    # Everything names its device: a script may have set another one as torch's default.
    random = torch.Generator("cpu").manual_seed(0)

    def tokens(length: int) -> Tensor:
        rows = torch.randn(1, length, _HEADS, head_dim, generator=random, device="cpu")
        return rows.to(dtype).transpose(1, 2)

    q, k, v = tokens(_QUERIES), tokens(_KEYS), tokens(_KEYS)
    k = k + tokens(1)  # keys have much in common, as in models
    tile = backend.tile_shape(head_dim)
    shape = (1, _HEADS, *tile.grid(_QUERIES, _KEYS))
    mask = torch.rand(shape, generator=random, device="cpu") < 0.5
    mask[..., 1] = True  # every query tile visits something
    lists, order = make_lists(mask), torch.randperm(_QUERIES, generator=random, device="cpu")
    on_card = (lists.to(device), order.to(device))
    scale = head_dim**-0.5
    # What 8 bits round away is the mode's, not a fault of the kernel: its truth rounds as well.
    reference = Int8Reference(tile) if qk == "int8" else ReferenceBackend(tile)
    card = (q.to(device), k.to(device), v.to(device))
    wide = (q.double(), k.double(), v.double())
    cases = (
        ((None, None), (None, None)),
        ((None, order), (None, on_card[1])),
        ((lists, order), on_card),
    )
    for here, there in cases:
        for criterion in (None, "mass", "gap"):
            got = backend.forward(Inputs(*card, scale, there[1]), there[0], criterion)
            want = reference.forward(Inputs(*wide, scale, here[1]), here[0], criterion)
            if reason := _difference(got, want, TOLERANCE[dtype]):
                which = "all tiles" if here[0] is None else "a tile list"
                return f"self-test at head_dim {head_dim}, {dtype}, {which}, {criterion}: {reason}"
    reason = _means_problem(backend, reference, card, wide, got, want, pack(mask), order)
    return reason and f"self-test at head_dim {head_dim}, {dtype}, skipped tiles: {reason}"


def _means_problem(
    backend: Backend,
    reference: Backend,
    card: tuple[Tensor, Tensor, Tensor],
    wide: tuple[Tensor, Tensor, Tensor],
    got: Attended,
    want: Attended,
    live: Tensor,
    order: Tensor,
) -> str | None:
    """What is wrong with what skipped tiles contribute to a call, or None. ``card``, ``wide``: q,
    k, v there and in float64; ``got``, ``want``: the results."""
    q, device = card[0], card[0].device
    tile, scale = backend.tile_shape(q.shape[-1]), q.shape[-1] ** -0.5
    here = Skipped(wide[0], pool(*wide[1:], tile.k), scale, live, order)
    there = Skipped(q, pool(*card[1:], tile.k), scale, live.to(device), order.to(device))
    audited = range(1, -(-q.shape[2] // tile.q))
    rows = rows_of(audited, tile, order)
    full = reference.forward(Inputs(wide[0][:, :, rows], *wide[1:], scale))
    on_card = Attended(full.out.to(q), full.lse.to(device), None)
    agreement = zip(
        backend.audit_skipped(got, there, on_card, audited),
        reference.audit_skipped(want, here, full, audited),
        strict=True,
    )
    if not all(torch.allclose(a.cpu().double(), b.double(), rtol=0.05) for a, b in agreement):
        return "means agree otherwise with what is missing"
    factor = torch.tensor([[0.0, 1.5]], device="cpu")
    backend.add_skipped(got, there, factor.to(device))
    reference.add_skipped(want, here, factor)
    return _difference(got, want, TOLERANCE[q.dtype])


def _difference(got: Attended, want: Attended, tolerance: float) -> str | None:
    out, lse = got.out.cpu().double(), got.lse.cpu()
    # Comparisons are written so that a result that is not a number fails.
    error = ((out - want.out).norm() / want.out.norm()).item()
    if not error <= tolerance:
        return f"relative error {error:.1e}, allowed {tolerance:.1e}"
    error = (lse - want.lse).abs().max().item()
    if not error <= LSE_TOLERANCE:
        return f"LSE off by {error:.1e}, allowed {LSE_TOLERANCE:.1e}"
    if want.score is None or got.score is None:
        return None
    score, visited = got.score.cpu(), want.score > -torch.inf
    if (score[~visited] > -torch.inf).any():
        return "a score for a tile that was not visited"
    # The running reference never scores below the final one (see gpu/kernels/attend.py).
    below = (want.score - score)[visited].max().item()
    if not below <= SCORE_TOLERANCE or not (score <= SCORE_TOLERANCE).all():
        return f"a score is {below:.2f} log2 too low or above 0"
    return None
