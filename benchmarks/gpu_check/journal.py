"""Results as they come: every section's JSON is written when it ends, and not measured again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from .bench import in_words

Section: TypeAlias = Callable[[], dict[str, Any]]


class Journal:
    """A folder with one file for each section that is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def done(self, name: str) -> dict[str, Any] | None:
        """What a section found, if it is done. One that failed is not, nor half a file."""
        try:
            found: dict[str, Any] = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return None if "failed" in found else found

    def run(self, name: str, section: Section) -> dict[str, Any]:
        """What a section finds, now or in an earlier run. One that fails says why: the others don't
        depend on it."""
        if (found := self.done(name)) is not None:
            return found
        begun = time.monotonic()
        try:
            found = section()
        except Exception as error:  # a driver, a card out of memory, someone else's package
            found = in_words(error)
        found["took"] = round(time.monotonic() - begun, 1)
        path = self._path(name)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
