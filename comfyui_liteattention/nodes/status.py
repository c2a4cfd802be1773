"""Text on a node while the graph runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


def status_of(node_id: str | None) -> Callable[[str], None] | None:
    """A function that shows a line of text on this node, or None where nobody is looking."""
    try:
        from server import PromptServer

        send = PromptServer.instance.send_progress_text
    except (ImportError, AttributeError):  # outside the server, or a version without it
        return None
    if node_id is None:
        return None

    def show(text: str) -> None:
        try:
            send(text, node_id)
        except Exception:  # a status line must never stop a generation
            log.debug("LiteAttention: the status can't be shown", exc_info=True)

    return show
