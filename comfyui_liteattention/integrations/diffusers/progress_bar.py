"""A few words on the progress bar that a pipeline shows.

diffusers makes its bars with tqdm, and tells nobody of them; tqdm knows which are open.
"""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def annotate(text: str) -> None:
    """Put ``text`` behind the newest bar that is open, if there is one."""
    bar: Any = max(
        (bar for bar in list(getattr(tqdm, "_instances", ())) if not bar.disable),
        key=lambda bar: bar.start_t,
        default=None,
    )
    if bar is not None:
        bar.set_postfix_str(text, refresh=False)
