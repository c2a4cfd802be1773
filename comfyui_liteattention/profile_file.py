"""Profiles in files: safetensors with one tensor ``ratios [layers, PHASES]`` float32 and JSON
metadata, on disk or on the Hugging Face hub at a pinned commit.

Reading one runs no code. Whatever is wrong is one ``ValueError`` that says what to do.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from types import ModuleType

import torch

from .learning import PHASES
from .profile import MAX_LAYERS, Fingerprint, Profile

FORMAT = 1
METADATA = "liteattention_profile"
TENSOR = "ratios"
EXTENSION = ".safetensors"
DEFAULT_FILE = f"profile{EXTENSION}"
MAX_BYTES = 1 << 20
HUB = re.compile(r"([\w.-]+/[\w.-]+)@([^:\s]+)(?::(\S+))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PATIENCE = 30.0  # seconds for the hub
# What helps against an answer of the hub. Anything else may pass by itself.
ADVICE = {
    401: "check the repository's name; if it is private or gated, log in with `hf auth login`",
    403: "ask for access on the repository's page, and log in with `hf auth login`",
    404: "check the names of the repository, the commit and the file",
}
TRY_AGAIN = "try again, or give a file on disk"


class _DamagedError(Exception):
    """What is wrong with a file."""


def save(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write the file; one that is there is replaced, in one go."""
    from safetensors.torch import save as pack

    about = {k: v for k, v in asdict(profile).items() if k not in (TENSOR, "name")}
    metadata = {METADATA: json.dumps({"format": FORMAT, **about})}
    ratios = torch.tensor(profile.ratios, dtype=torch.float32, device="cpu")
    data = pack({TENSOR: ratios}, metadata)
    part = Path(f"{os.fspath(path)}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(
            f"LiteAttention: {os.fspath(path)!r} can't be written ({error.strerror}); choose a "
            "file name in a folder that exists."
        ) from error


def load(source: str | os.PathLike[str]) -> Profile:
    """The profile in a file, or at ``owner/repo@commit[:file]`` on the hub."""
    text = os.fspath(source)
    reference = parse_hub(text)
    if reference is not None and not _is_file(Path(text)):
        path, name = Path(_download(*reference)), text
    else:
        path, name = Path(text), Path(text).name
    says = f"LiteAttention: the profile {text!r}"
    if not _is_file(path):
        raise ValueError(
            f"{says} is not there; give a file, or owner/repo@commit:file for one on the hub."
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _DamagedError(f"it is larger than {MAX_BYTES >> 20} MiB")
        return replace(_read(path), name=name)
    except _DamagedError as error:
        raise ValueError(
            f"{says} can't be used: {error}; take another file, or save a profile anew."
        ) from error


def parse_hub(text: str) -> tuple[str, str, str] | None:
    """``owner/repo@commit[:file]`` -> repository, commit and file; None for anything else."""
    match = HUB.fullmatch(text)
    return None if match is None else (match[1], match[2], match[3] or DEFAULT_FILE)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read(path: Path) -> Profile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA not in metadata or list(file.keys()) != [TENSOR]:
                raise _DamagedError("it is not a profile")
            found = file.get_slice(TENSOR)
            rows, *columns = found.get_shape() or [0]
            if found.get_dtype() != "F32" or columns != [PHASES] or rows > MAX_LAYERS:
                raise _DamagedError(f"its {TENSOR} have another type or shape")
            ratios = tuple(map(tuple, file.get_tensor(TENSOR).tolist()))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _DamagedError("it is damaged, or not a safetensors file") from error
    try:
        about = json.loads(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise _DamagedError("its metadata is damaged") from error
    if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
        raise _DamagedError(f"its format is another than {FORMAT}, the one that is known here")
    try:
        layers, model = about.pop("layers"), about.pop("model")
        if not isinstance(layers, list):
            raise TypeError("layers")
        return Profile(tuple(layers), ratios, Fingerprint(*model), **about)
    except (KeyError, TypeError, ValueError) as error:
        raise _DamagedError("its metadata has missing or impossible values") from error


def _download(repository: str, commit: str, file: str) -> str:
    """Path of a file of the hub in huggingface_hub's cache, which also does the work offline."""
    says = f"LiteAttention: the profile {repository}@{commit}:{file}"
    if not COMMIT.fullmatch(commit):
        raise ValueError(
            f"{says} has no pinned revision; write the 40 digits of a commit after the @."
        )
    if not file.endswith(EXTENSION) or ".." in file.split("/"):
        raise ValueError(f"{says} is not a safetensors file; name one after the colon.")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise ValueError(
            f"{says} needs huggingface_hub: pip install huggingface_hub, or give a file on disk."
        ) from error
    try:
        path = _in_time(_fetch, hub, repository, commit, file)
    except Exception as error:  # of the network, the hub or its cache: they have no common type
        raise ValueError(f"{says} can't be fetched {_because(error)}.") from error
    if path is None:
        raise ValueError(f"{says} is larger than {MAX_BYTES >> 20} MiB; name another file.")
    return path


def _fetch(hub: ModuleType, repository: str, commit: str, file: str) -> str | None:
    """Path in the cache; None: the file is too large."""
    cached = hub.try_to_load_from_cache(repository, file, revision=commit)
    if isinstance(cached, str):
        return cached
    size = hub.get_hf_file_metadata(hub.hf_hub_url(repository, file, revision=commit)).size
    if size is not None and size > MAX_BYTES:
        return None
    return hub.hf_hub_download(repository, file, revision=commit)


def _in_time(work: Callable[..., str | None], *arguments: object) -> str | None:
    """What the work returns, or a TimeoutError.

    The client limits each wait but not all its tries together: they take minutes, or have no end
    when bytes come one by one. It can't be stopped; what it fetches late is in its cache next time.
    """
    result: Future[str | None] = Future()

    def run() -> None:
        try:
            result.set_result(work(*arguments))
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([result], PATIENCE).done:
        raise TimeoutError(f"it took longer than {PATIENCE:g} s")
    return result.result()


def _because(error: Exception) -> str:
    """The client's words in one line, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    why = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
    return f"({why}); {ADVICE.get(status, TRY_AGAIN)}"
