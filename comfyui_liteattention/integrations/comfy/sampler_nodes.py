"""Which node of the graph samples, and which one made a latent."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def sampling_node() -> str | None:
    """Id of the node that ComfyUI is executing; None outside of a graph."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:  # older than any version that we know of
        return None
    context = get_executing_context()
    return None if context is None else context.node_id


def nearest(graph: Any, node: str, entry: str, known: Collection[str]) -> str | None:
    """The closest of the ``known`` nodes upstream of a node's input ``entry``, or None. ``graph``:
    ComfyUI's ``DynamicPrompt``."""
    level, seen = _sources(graph, node, entry), {node}
    while level:
        for one in level:
            if one in known:
                return one
        seen.update(level)
        further = (above for one in level for above in _sources(graph, one))
        level = [one for one in dict.fromkeys(further) if one not in seen]
    return None


def _sources(graph: Any, node: str, entry: str | None = None) -> list[str]:
    """Nodes that the inputs of a node, or only its input ``entry``, are linked to."""
    if not graph.has_node(node):
        return []
    inputs = graph.get_node(node)["inputs"]
    chosen = inputs.values() if entry is None else [inputs.get(entry)]
    return [value[0] for value in chosen if isinstance(value, list) and len(value) == 2]
