"""Where compiled kernels are kept between programs: outside the package, so that uninstalling
leaves nothing in its folder, and the package may be installed where it can't write."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = "liteattention"


def folder() -> Path:
    """``liteattention`` in the system's cache folder; it is not created here."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / NAME / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / NAME
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / NAME


@contextmanager
def kept_apart() -> Iterator[None]:
    """Functions that numba compiles get our cache folder if they are decorated in this context:
    numba looks the folder up when a function is decorated. ``NUMBA_CACHE_DIR``, where the user set
    it, takes precedence, and where our folder can't be created numba chooses another."""
    import numba

    config: Any = numba.config
    chosen = config.CACHE_DIR
    if not chosen:
        with suppress(RuntimeError):  # no home folder is known
            config.CACHE_DIR = str(folder())
    try:
        yield
    finally:
        config.CACHE_DIR = chosen
