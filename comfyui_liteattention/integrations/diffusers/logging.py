"""How much LiteAttention says, with the same functions as ``diffusers.utils.logging``.

Messages go to Python's logging under the name of this package, one line per run at level INFO.
Warnings are shown by default. Nothing is printed.
"""

from __future__ import annotations

import logging
import sys

CRITICAL = logging.CRITICAL
DEBUG = logging.DEBUG
ERROR = logging.ERROR
INFO = logging.INFO
WARNING = logging.WARNING

_root = logging.getLogger(__name__.partition(".integrations")[0])
_shown = logging.StreamHandler(sys.stderr)


def get_verbosity() -> int:
    """The lowest level at which messages are shown."""
    return _root.getEffectiveLevel()


def set_verbosity(level: int) -> None:
    """Show messages from ``level`` up; on standard error if no other handler shows them."""
    _root.setLevel(level)
    if not _root.hasHandlers():
        _root.addHandler(_shown)


def set_verbosity_debug() -> None:
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Also show one line about each run."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Show no warnings."""
    set_verbosity(ERROR)
