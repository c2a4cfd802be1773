"""Everything about the kernels that a machine without a graphics card can't know.

    python -m benchmarks.gpu_check [--minutes 8]

What is installed; self-tests; accuracy of every mode against float64; whole runs of the demo; speed
at 32k and 75k tokens with 0 to 90 % of the tiles skipped, against whatever attention is installed.
Needs torch, safetensors, numpy and Pillow. Each section writes its file when it ends: started again
(with more ``--minutes``), those that are done are not measured again. The last line can be pasted
into an issue. **Never run on a card yet.**
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from comfyui_liteattention.backends.base import TileMap
from comfyui_liteattention.backends.gpu.kernel_table import HEAD_DIMS

from .accuracy import accuracy
from .bench import Bench, providers_on
from .demo_runs import demo_runs
from .journal import Journal, Section
from .speed import speed
from .summary import line, tables

PACKAGES = ("torch", "triton", "diffusers", "sageattention", "flash_attn_3", "comfy_kitchen")
#: What a device without a card is asked for: enough to see that the command works.
TRIAL: dict[str, Any] = {"tokens": (1024,), "heads": 1, "steps": 3, "latent": (16, 8, 32, 32)}


def installed(bench: Bench) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {"system": f"{platform.system()} {platform.machine()}"}
    found["python"] = platform.python_version()
    found["package"] = f"liteattention {_version('liteattention') or 'from source'}"
    found |= {name: _version(name) for name in PACKAGES}
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_properties(bench.device)
        found["card"] = f"{card.name} (sm_{card.major}{card.minor})"
        found |= {"multiprocessors": card.multi_processor_count, "cuda": torch.version.cuda}
        found["memory_gib"] = round(card.total_memory / 2**30, 1)
    return found


def selftests(bench: Bench) -> dict[str, Any]:
    """Mode, head_dim and dtype, and the tile map -> None, or why these kernels aren't trusted."""
    results: dict[str, str | None] = {}
    for mode in bench.providers:
        for head_dim in HEAD_DIMS:
            for dtype in (torch.bfloat16, torch.float16):
                found = bench.backend(mode, head_dim, dtype)
                name = f"{mode}, head_dim {head_dim}, {str(dtype).split('.')[1]}"
                results[name] = found if isinstance(found, str) else None
    backend = bench.backend("native", 128, torch.bfloat16)
    kernels: TileMap | None = None
    if not isinstance(backend, str) and bench.device.type == "cuda":
        kernels = backend.tile_map(bench.device)
        results["tile map"] = None if kernels is not None else "torch does it, see the log"
    return {"results": results}


def sections(bench: Bench) -> dict[str, Section]:
    """In the order of what is worth most."""
    every = {"selftests": selftests, "accuracy": accuracy, "demo": demo_runs, "speed": speed}
    return {name: partial(section, bench) for name, section in every.items()}


def check(bench: Bench, folder: Path) -> str:
    """Runs what isn't done; the tables and the line."""
    journal = Journal(folder)
    found = {"installed": installed(bench)}  # now, whatever it was when the rest was measured
    for name, section in sections(bench).items():
        if journal.done(name) is None and bench.left <= 0:
            print(f"{name}: no time left; start again to go on", flush=True)
            continue
        found[name] = journal.run(name, section)
        print(f"{name}: {found[name].get('failed') or 'done'}", flush=True)
    return f"\n{tables(found)}\n\n{line(found)}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="begin nothing after so many")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of results")
    parser.add_argument("--device", default="cuda", help="cpu: a trial of the command, no figures")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no graphics card that torch can use; --device cpu tries the command without one")
    size = TRIAL if device.type == "cpu" else {}
    deadline = time.monotonic() + 60 * options.minutes
    print(check(Bench(device, providers_on(device), deadline, **size), options.out))


if __name__ == "__main__":
    main()
