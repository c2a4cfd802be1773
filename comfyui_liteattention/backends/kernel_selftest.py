"""Whether a kernel computes the right thing on this card: a small problem against the reference.

No kernel is trusted before it has passed; one with a wrong result stays off, with the reason. A
lack of memory is no verdict: a kernel may be needed first when a model fills the card. An error is
one for a run, since what caused it may pass; the third is final.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..tiles import make_lists, pack
from .base import Attended, Backend, Criterion, Inputs, Skipped
from .gpu.kernel_table import CRITERIA, NATIVE, Method
from .gpu.low_precision import LowPrecisionReference
from .pooled import pool

#: Largest relative error (Frobenius norm) of the output; plain attention stays below a third of it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
#: The same where p is rounded to e4m3.
TOLERANCE_E4M3 = 0.08
LSE_TOLERANCE = 1e-2
SCORE_TOLERANCE = 0.05  # log2
_HEADS, _QUERIES, _KEYS = 2, 300, 470
_ATTEMPTS = 3

NO_MEMORY = "not enough memory to test the kernel on this device: tried again at the next run"


@dataclass(frozen=True)
class Trial:
    """What a backend is tested with. ``method``: how it multiplies, which decides what it may round
    away; ``criteria``: the scores that it has."""

    head_dim: int
    dtype: torch.dtype
    device: torch.device
    method: Method = NATIVE
    criteria: tuple[Criterion | None, ...] = CRITERIA

    @property
    def tolerance(self) -> float:
        return TOLERANCE_E4M3 if self.method.values == "e4m3" else TOLERANCE[self.dtype]


class Verdict(NamedTuple):
    """``reason``: why a backend isn't trusted, or None. ``final``: it will not be tried again.
    ``attempts``: how often it was tried."""

    reason: str | None
    final: bool
    attempts: int = 1


class Verdicts:
    """Results of the self-tests of one backend."""

    def __init__(self) -> None:
        self._found: dict[Trial, Verdict] = {}
        self._again: dict[Trial, int] = {}
        self._testing = threading.Lock()

    def of(self, backend: Backend, trial: Trial) -> str | None:
        """Why the backend isn't trusted with this, or None. The first call runs the test, each one
        after a lack of memory, and the first of a run after an error."""
        if trial not in self._found:  # asked often: only a test is waited for
            with self._testing:
                if trial not in self._found:
                    verdict = judge(backend, trial)
                    if verdict.reason == NO_MEMORY:
                        return NO_MEMORY
                    attempts = 1 + self._again.get(trial, 0)
                    self._found[trial] = verdict._replace(attempts=attempts)
        return self._found[trial].reason

    def begin_run(self) -> None:
        """Let what ended in an error be tried again."""
        with self._testing:
            for trial, verdict in [*self._found.items()]:
                if not verdict.final and verdict.attempts < _ATTEMPTS:
                    self._again[trial] = verdict.attempts
                    del self._found[trial]


def judge(backend: Backend, trial: Trial) -> Verdict:
    """Whether the backend is trusted with this; never raises."""
    try:
        return Verdict(with_room(partial(problem, backend, trial)), final=True)
    # Whatever a driver or a compiler throws: the kernel isn't trusted, and the user sees why.
    except Exception as error:
        if lacks_memory(error):
            return Verdict(NO_MEMORY, final=False)
        reason = f"self-test failed: {type(error).__name__}: {error}"
        return Verdict(reason, final=False)


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


def problem(backend: Backend, trial: Trial) -> str | None:
    """What is wrong with the backend's results, or None.

    Ragged ends, tokens-first layout, all tiles and a list that skips some, queries as they come and
    in an order of their own, each criterion, an audit; what skipped tiles contribute.
    """
    # Everything names its device: a script may have set another one as torch's default.
    random = torch.Generator("cpu").manual_seed(0)
    head_dim, dtype, device = trial.head_dim, trial.dtype, trial.device

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
    here = Inputs(q.double(), k.double(), v.double(), head_dim**-0.5)
    there = Inputs(q.to(device), k.to(device), v.to(device), head_dim**-0.5)
    ordered = (here._replace(order=order), there._replace(order=order.to(device)))
    reference = LowPrecisionReference(trial.method, tile)
    cases = ((here, there, None), (*ordered, None), (*ordered, lists))
    for wide, card, tiles in cases:
        for criterion in trial.criteria:
            got = backend.forward(card, None if tiles is None else tiles.to(device), criterion)
            want = reference.forward(wide, tiles, criterion)
            if reason := _difference(got, want, trial.tolerance):
                listed = "all tiles" if tiles is None else "a tile list"
                return f"self-test at head_dim {head_dim}, {dtype}, {listed}, {criterion}: {reason}"
    if reason := _order_problem(backend, reference, (here, there), ordered[1].order, trial):
        return f"self-test at head_dim {head_dim}, {dtype}, in an order: {reason}"
    wide, card = ordered
    audited = range(1, shape[2])
    got, full = backend.forward_and_audit(card, lists.to(device), None, audited)
    want, want_full = reference.forward_and_audit(wide, lists, None, audited)
    for found, wanted in ((got, want), (full, want_full)):
        if reason := _difference(found, wanted, trial.tolerance):
            return f"self-test at head_dim {head_dim}, {dtype}, an audit: {reason}"
    pooled = (pool(wide.k, wide.v, tile.k), pool(card.k, card.v, tile.k))
    means = (
        Skipped(wide.q, pooled[0], wide.scale, pack(mask), wide.order),
        Skipped(card.q, pooled[1], card.scale, pack(mask).to(device), card.order),
    )
    reason = _means_problem(backend, reference, means, (want, got), want_full, trial.tolerance)
    return reason and f"self-test at head_dim {head_dim}, {dtype}, skipped tiles: {reason}"


def _order_problem(
    backend: Backend,
    reference: Backend,
    calls: tuple[Inputs, Inputs],
    order: Tensor | None,
    trial: Trial,
) -> str | None:
    """What is wrong with as many keys as queries, put in an ``order``, or None. ``calls``: in
    float64 and on the card."""
    results = []
    for attends, call in zip((reference, backend), calls, strict=True):
        k, v = (x[:, :, :_QUERIES] for x in call[1:3])
        here = None if order is None else order.to(k.device)
        listed, means = attends.in_order(call._replace(k=k, v=v), here, means=True)
        results.append((attends.forward(listed), means))
    (want, wanted), (got, found) = results
    if found is None or wanted is None:
        return "no means of the key tiles"
    for a, b in zip(found[:2], wanted[:2], strict=True):
        error = ((a.cpu().double() - b).norm() / b.norm()).item()
        if not error <= TOLERANCE[trial.dtype]:
            return f"relative error of means {error:.1e}"
    return _difference(got, want, trial.tolerance)


def _means_problem(
    backend: Backend,
    reference: Backend,
    skipped: tuple[Skipped, Skipped],
    results: tuple[Attended, Attended],
    full: Attended,
    tolerance: float,
) -> str | None:
    """What is wrong with what skipped tiles contribute to a call, or None. Pairs: in float64 and on
    the card; ``full``: the truth of all query tiles but the first."""
    (here, there), (want, got) = skipped, results
    q, device = there.q, there.q.device
    audited = range(1, want.lse.shape[2] // backend.tile_shape(q.shape[-1]).q + 1)
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
    return _difference(got, want, tolerance)


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
