"""What parts are worth that no setting switches off: ``python -m benchmarks.ablation``.

Samples the demo's model at lost-mass budgets, on development seeds: as it is; with a separate
budget for every layer instead of a shared one (budget/allocation.py); with the means of skipped
tiles weighted by 1 instead of by a factor for each head (tail.py); and with the tile shapes of the
graphics cards' kernels, computed by the plain PyTorch backend.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.demo_video import DEVELOPMENT, DemoVideos
from benchmarks.record import write_json
from comfyui_liteattention import attention
from comfyui_liteattention.backends import tile_map
from comfyui_liteattention.backends.base import Agreement
from comfyui_liteattention.backends.reference import ReferenceBackend
from comfyui_liteattention.budget import allocation
from comfyui_liteattention.integrations.diffusers import session
from comfyui_liteattention.report.compare import compare
from comfyui_liteattention.settings import Settings
from comfyui_liteattention.tiles import TileShape


@contextmanager
def layers_alone() -> Iterator[None]:
    """Every layer holds the allowance separately, instead of all together."""

    def alone(*asked: Any) -> allocation.Choice:
        *own, _, aim = asked
        call: list[Any] = [*own, [], aim]
        return allocation.choose(*call)

    with mock.patch.object(tile_map, "choose", alone):
        yield


@contextmanager
def means_count_once() -> Iterator[None]:
    """The means of skipped tiles count with the factor 1 in every head."""

    def one(fit: Agreement) -> Tensor:
        return torch.ones_like(fit.power)

    with mock.patch.object(attention.tail, "factor", one):
        yield


def tiles_of(queries: int, keys: int) -> AbstractContextManager[Any]:
    """Tiles of ``queries x keys`` tokens."""
    backend = ReferenceBackend(TileShape(queries, keys), torch.float32)
    return mock.patch.object(session, "backend_for", return_value=backend)


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "as it is": nullcontext,
    "every layer for itself": layers_alone,
    "means count once": means_count_once,
    "tiles of 128 x 64": partial(tiles_of, 128, 64),
    "tiles of 128 x 128": partial(tiles_of, 128, 128),
}


def measure(budgets: list[float], seeds: int, steps: int) -> list[dict[str, Any]]:
    """A row for every variant, budget and seed."""
    videos, rows = DemoVideos(), []
    for case in DEVELOPMENT[:seeds]:
        case = case._replace(steps=steps)
        dense = videos.dense(case)
        for budget in budgets:
            for variant, changed in VARIANTS.items():
                with changed():
                    sampled = videos.lite(case, Settings(budget=budget))
                closeness = compare(dense.video, sampled.video).psnr_all
                row = {"variant": variant, "budget": budget, "seed": case.seed, "steps": steps}
                rows.append(row | {"computed_fraction": sampled.computed, "psnr_db": closeness})
                print(*rows[-1].values(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ablation", description=__doc__)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.03, 0.1])
    parser.add_argument("--seeds", type=int, default=len(DEVELOPMENT))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows = measure(options.budgets, options.seeds, options.steps)
    if options.json:
        write_json(options.json, rows=rows)


if __name__ == "__main__":
    main()
