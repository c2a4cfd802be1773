"""Where compiled kernels are kept between programs: outside of the package, so that an uninstall
leaves nothing in its folder, and a folder that can't be written does as well."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = "liteattention"


def folder() -> Path:
    """``liteattention`` in the place that the system has for such files; nothing is made here."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / NAME / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / NAME
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / NAME


@contextmanager
def kept_apart() -> Iterator[None]:
    """numba asks for its cache folder when a function is decorated, and keeps to that: what is
    decorated in here is kept in our folder. A folder that the user has chosen (``NUMBA_CACHE_DIR``)
    stays, and where ours can't be made numba finds another by itself."""
    import numba

    config: Any = numba.config
    chosen = config.CACHE_DIR
    if not chosen:
        with suppress(RuntimeError):  # nobody's home is known
            config.CACHE_DIR = str(folder())
    try:
        yield
    finally:
        config.CACHE_DIR = chosen
