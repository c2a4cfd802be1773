"""Results as files, with the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def describe_machine() -> dict[str, str | int]:
    """What the numbers depend on: CPU, threads, versions."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": _version("numba"),
    }


def write_json(path: Path, **found: object) -> None:
    """Write a benchmark's results, with the machine that they were measured on."""
    path.write_text(json.dumps({"machine": describe_machine()} | found, indent=1))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
