"""Text on a node while the graph runs, shown by web/liteattention.js.

ComfyUI's own progress text is not enough: newer front ends remove it when the run ends, it can't be
translated, and in a subgraph it is visible only from inside.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

EVENT = "liteattention.status"


def status_of(node_id: str | None) -> Callable[[str], None] | None:
    """A function that shows a line of text on this node, or None outside ComfyUI's server."""
    try:
        from server import PromptServer

        server = PromptServer.instance
    except (ImportError, AttributeError):  # outside the server
        return None
    if node_id is None:
        return None

    def show(text: str) -> None:
        try:
            # To the browser page that queued this run; to all if none did.
            server.send_sync(EVENT, {"node": node_id, "text": text}, server.client_id)
        except Exception:  # a status line must never stop a generation
            log.debug("LiteAttention: the status can't be shown", exc_info=True)

    return show
