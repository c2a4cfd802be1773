"""A few words on the progress bar that a pipeline shows.

diffusers' bars are tqdm's and can't be reached through the pipeline, but tqdm lists the open ones.
"""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def annotate(text: str) -> None:
    """Show ``text`` after the newest open bar, if there is one."""
    bar: Any = max(
        (bar for bar in list(getattr(tqdm, "_instances", ())) if not bar.disable),
        key=lambda bar: bar.start_t,
        default=None,
    )
    if bar is not None:
        bar.set_postfix_str(text, refresh=False)
