"""Text on a node while the graph runs, shown by web/liteattention.js.

ComfyUI's own progress text won't do: newer front ends take it away when the run ends, it can't be
translated, and in a subgraph it is seen from inside alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)

EVENT = "liteattention.status"


def status_of(node_id: str | None) -> Callable[[str], None] | None:
    """A function that shows a line of text on this node, or None where nobody is looking."""
    try:
        from server import PromptServer

        server = PromptServer.instance
    except (ImportError, AttributeError):  # outside the server
        return None
    if node_id is None:
        return None

    def show(text: str) -> None:
        try:
            # To the page that asked for this run; to all where none did.
            server.send_sync(EVENT, {"node": node_id, "text": text}, server.client_id)
        except Exception:  # a status line must never stop a generation
            log.debug("LiteAttention: the status can't be shown", exc_info=True)

    return show
