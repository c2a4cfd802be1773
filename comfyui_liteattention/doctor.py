"""What is on this machine, which kernel will be used, and why not another."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .backends import backend_for, capability
from .backends.base import Provider
from .backends.constraints import Constraints
from .backends.cpu import backend as cpu
from .backends.gpu import launches as gpu
from .backends.modes import AS_EXACT, fastest

#: A note for every graphics card.
UNTRIED = "its kernels were built and tested without a GPU; no GPU has run them yet"

#: The tensors that each device type's kernels accept.
TAKES: dict[str, Constraints] = {"cpu": cpu.CONSTRAINTS, "cuda": gpu.CONSTRAINTS}

PACKAGES = ("torch", "numba", "triton", "diffusers", "flash-attn", "sageattention")


def examine() -> dict[str, Any]:
    """The machine and the backend of every device, as JSON-ready data."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "comfyui": _comfyui_version(),
        "devices": [_examine_device(device) for device in _devices()],
    }


def report(as_json: bool = False) -> str:
    """The findings, as text or as JSON."""
    findings = examine()
    return json.dumps(findings, indent=2) if as_json else render(findings)


def render(findings: dict[str, Any]) -> str:
    """The findings as text."""
    packages = {"comfyui": findings["comfyui"], **findings["packages"]}
    lines = [f"Python {findings['python']} on {findings['system']}"]
    lines += [f"  {name:<14} {version or 'not found'}" for name, version in packages.items()]
    for device in findings["devices"]:
        lines += ["", f"{device['device']}: {device['name']}"]
        if device["backend"]:
            lines.append(f"  LiteAttention will be active: {device['backend']} backend, ")
            lines[-1] += "self-test passed"
            lines.append(f"  It takes {device['takes']}")
            lines += [f"  Mode auto chooses {_in_words(device['auto'])}"] if device["auto"] else []
            if device["note"]:
                lines.append(f"  Mind that {device['note']}")
        else:
            lines.append(
                f"  LiteAttention stays inactive, attention runs as before: {device['reason']}"
            )
    return "\n".join(lines)


def _examine_device(device: torch.device) -> dict[str, Any]:
    found = backend_for(device)
    reason = found if isinstance(found, str) else _failed_test(found, device)
    return {
        "device": str(device),
        "name": _device_name(device),
        "backend": None if isinstance(found, str) or reason else found.name,
        "self_test": None if reason else "passed",
        "reason": reason,
        "takes": TAKES[device.type].describe(),
        "auto": _auto(device) if device.type == "cuda" else {},
        "note": UNTRIED if device.type == "cuda" else None,
    }


def _auto(device: torch.device) -> dict[str, str]:
    """What mode ``auto`` is beside each attention in 8 bits, which a run recognises."""
    card = capability(device)
    return {users: fastest(users, card) or "native" for users in AS_EXACT}


def _in_words(auto: dict[str, str]) -> str:
    beside = "; ".join(f"{mode} beside {users}" for users, mode in auto.items() if mode != "native")
    return f"native beside attention in 16 bits; {beside}" if beside else "native"


def _failed_test(provider: Provider, device: torch.device) -> str | None:
    """Why a card's kernels fail for the usual case, head_dim 128 in bfloat16, or None. (The CPU's
    kernel was tested when it was chosen.)"""
    if device.type == "cpu":
        return None
    found = provider.provide(device, 128, torch.bfloat16)
    return found if isinstance(found, str) else None


def _devices() -> list[torch.device]:
    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [*cards, torch.device("cpu")]


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}), CUDA {torch.version.cuda}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _comfyui_version() -> str | None:
    """The version of the ComfyUI whose ``custom_nodes`` hold this package, if any."""
    for folder in Path(__file__).absolute().parents:
        version = folder / "comfyui_version.py"
        if version.is_file():
            return version.read_text().rpartition("=")[2].strip().strip('"')
    return None
