"""Prebuilt kernels on NVIDIA cards: loaded through the driver, launched on torch's stream.

No compiler, no triton, no extension module. A kernel is read from its archive when it is first
needed, compared with the manifest, tried on a small problem and only then trusted, once per
process, card, head_dim and dtype. **No GPU has run this yet**; the tests use a stand-in for the
driver.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from ...tiles import TileLists, TileShape
from .. import kernel_selftest
from ..base import Attended, Criterion, Qk, TileMap
from ..pooled import Agreement, Pooled, audit_skipped
from . import launches, tile_map
from .archive import Prebuilt, PrebuiltError
from .driver import ArgumentBlock, Driver, DriverError, Loaded
from .kernel_table import DTYPES, HEAD_DIMS, KERNELS, TILE, TRAILING_POINTERS, Kernel, Variant


class Launcher:
    """Loaded kernels of every card of this process. Safe to use from several threads."""

    def __init__(self, prebuilt: Prebuilt | None = None, driver: Driver | None = None) -> None:
        self._prebuilt = prebuilt or Prebuilt()
        self._given_driver = driver
        self._arguments = {
            entry.name: ArgumentBlock([t for _, t in entry.parameters] + ["*"] * TRAILING_POINTERS)
            for entry in {kernel.entry for kernel in KERNELS}
        }
        self._kernels: dict[tuple[int, Kernel], Loaded] = {}
        self._loading = threading.Lock()

    @functools.cached_property
    def _driver(self) -> Driver:
        return self._given_driver or Driver()

    def missing(self, device: torch.device, qk: Qk = "native") -> str | None:
        """Why nothing prebuilt runs on this card, or None."""
        try:
            capability = _capability(device)
            archive = self._prebuilt.archive(capability)
            if archive is None:
                return f"no prebuilt kernel for compute capability {capability / 10}"
            probe = Variant(HEAD_DIMS[0], DTYPES[0], False, None, qk)
            if not self._prebuilt.has(archive, probe):
                return f"no prebuilt {qk} kernel for compute capability {capability / 10}"
            self._driver  # noqa: B018 - opened here, so that a missing driver has a reason
        except (DriverError, PrebuiltError) as error:
            return str(error)
        return None

    def launch(self, launch: launches.Launch, device: torch.device) -> None:
        """Launch on the current stream of the card that holds the tensors."""
        number = launches.card_number(device)
        loaded = self._kernels.get((number, launch.kernel)) or self._load(number, launch.kernel)
        values = [_value(a) for a in launch.arguments]
        block = self._arguments[launch.kernel.entry.name]
        pointers = block.fill(values + [0] * TRAILING_POINTERS)
        stream = torch.cuda.current_stream(device).cuda_stream
        self._driver.launch(loaded, launch.grid, stream, pointers)

    def _load(self, number: int, kernel: Kernel) -> Loaded:
        with self._loading:
            if (number, kernel) not in self._kernels:
                capability = _capability(torch.device("cuda", number))
                archive = self._prebuilt.archive(capability)
                if archive is None:
                    raise PrebuiltError(f"no prebuilt kernel for capability {capability / 10}")
                code = self._prebuilt.read(archive, kernel)
                self._kernels[number, kernel] = self._driver.load(
                    number, code.image, kernel.entry.name, code.warps, code.shared
                )
            return self._kernels[number, kernel]


class CudaBackend:
    """See :class:`~.base.Backend`. One object serves all cards."""

    running_scores = True

    def __init__(self, qk: Qk = "native", launcher: Launcher | None = None) -> None:
        self.qk = qk
        self.name = "cuda" if qk == "native" else f"cuda, {qk}"
        self.launcher = launcher or _launcher()
        self._verdicts = kernel_selftest.Verdicts()
        self._maps = tile_map.TileMaps(self.launcher.launch)

    def tile_shape(self, head_dim: int) -> TileShape:
        return TILE

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend can't work on a device at all, or None."""
        if device.type != "cuda":
            return f"tensors on {device.type}, not on an NVIDIA card"
        if torch.version.hip is not None:
            return "prebuilt kernels are for NVIDIA cards, this torch is for AMD"
        return self.launcher.missing(device, self.qk)

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        if q.device.type != "cuda":
            return self.unavailable(q.device)
        return launches.unsupported(q, k, v) or self.untrusted(
            launches.card_number(q.device), q.shape[-1], q.dtype
        )

    @torch.compiler.assume_constant_result
    def untrusted(self, number: int, head_dim: int, dtype: torch.dtype) -> str | None:
        device = torch.device("cuda", number)
        missing = self.unavailable(device)
        return missing or self._verdicts.of(self, head_dim, dtype, device, self.qk)

    def tile_map(self, device: torch.device) -> TileMap | None:
        """See tile_map.py."""
        return self._maps.of(device)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        lists: TileLists | None = None,
        criterion: Criterion | None = None,
        order: Tensor | None = None,
    ) -> Attended:
        if torch.compiler.is_compiling():
            count, index = (lists.count, lists.index) if lists is not None else (None, None)
            out, lse, score = _attend(q, k, v, scale, count, index, criterion, order, self.qk)
            return Attended(out, lse, None if criterion is None else score)
        return _forward(self.launcher, q, k, v, scale, lists, criterion, order, self.qk)

    def add_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        factor: Tensor,
        order: Tensor | None = None,
    ) -> None:
        if torch.compiler.is_compiling():
            _add_skipped(q, *pooled[:3], kept.out, kept.lse, live, factor, order, scale)
        else:
            launch = launches.prepare_skipped(kept, q, pooled, scale, live, factor, order)
            self.launcher.launch(launch, q.device)

    def audit_skipped(
        self,
        kept: Attended,
        q: Tensor,
        pooled: Pooled,
        scale: float,
        live: Tensor,
        full: Attended,
        audited: range,
        order: Tensor | None = None,
    ) -> Agreement:
        if torch.compiler.is_compiling():  # a compiler makes its own kernels of it
            tile = self.tile_shape(q.shape[-1])
            return audit_skipped(kept, q, pooled, scale, live, full, audited, tile, order)
        launch, sums = launches.prepare_audit(kept, q, pooled, scale, live, full, audited, order)
        self.launcher.launch(launch, q.device)
        return launches.agreement(sums)


@functools.cache
def _launcher() -> Launcher:
    """The process's launcher, which the custom op uses."""
    return Launcher()


def _forward(
    launcher: Launcher,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    lists: TileLists | None,
    criterion: Criterion | None,
    order: Tensor | None,
    qk: Qk,
) -> Attended:
    call = launches.prepare(q, k, v, scale, lists, criterion, order, qk=qk)
    for launch in call.launches:
        launcher.launch(launch, q.device)
    return call.finish()


# For torch.compile only; eager calls launch directly, which costs less.
@torch.library.custom_op(
    "liteattention::attend",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? count, Tensor? index, "
    "str? criterion, Tensor? order, str qk) -> (Tensor, Tensor, Tensor)",
)
def _attend(q, k, v, scale, count, index, criterion, order, qk):  # type: ignore[no-untyped-def]
    lists = None if count is None else TileLists(count, index)
    q, k, v = (launches.aligned(x) for x in (q, k, v))
    result = _forward(_launcher(), q, k, v, scale, lists, criterion, order, qk)
    return _three(result)


@_attend.register_fake
def _(q, k, v, scale, count, index, criterion, order, qk):  # type: ignore[no-untyped-def]
    return _three(launches.allocate(q, k, count is not None, criterion))


@torch.library.custom_op(
    "liteattention::add_skipped",
    mutates_args=("out",),
    device_types="cuda",
    schema="(Tensor q, Tensor keys, Tensor values, int length, Tensor(a!) out, Tensor lse, "
    "Tensor live, Tensor factor, Tensor? order, float scale) -> ()",
)
def _add_skipped(q, keys, values, length, out, lse, live, factor, order, scale):  # type: ignore[no-untyped-def]
    pooled, q = Pooled(keys, values, length, TILE.k), launches.aligned(q)
    kept = Attended(out, lse, None)
    launch = launches.prepare_skipped(kept, q, pooled, scale, live, factor, order)
    _launcher().launch(launch, q.device)


@_add_skipped.register_fake
def _(q, keys, values, length, out, lse, live, factor, order, scale):  # type: ignore[no-untyped-def]
    return None


def _three(result: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """An op can't return None: without a criterion the score is empty."""
    score = result.score if result.score is not None else result.lse.new_empty(0)
    return result.out, result.lse, score


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _value(argument: Tensor | int | float | None) -> int | float:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument
