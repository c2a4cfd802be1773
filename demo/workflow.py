"""Workflow files as the browser saves them -> graphs as the server runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Graph = dict[str, dict[str, Any]]

BYPASSED, MUTED = 4, 2
MISSING = object()
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
NOT_EXECUTED = {"Note", "MarkdownNote"}


def load_workflow(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def to_graph(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    """UI format -> API format. Bypassed nodes pass their first input of the same type through."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    graph: Graph = {}
    for node in nodes.values():
        if node.get("mode", 0) in (BYPASSED, MUTED) or node["type"] in NOT_EXECUTED:
            continue
        inputs = _widgets(node, object_info[node["type"]])
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                source = _source(slot["link"], nodes, links)
                if source is not None:
                    inputs[slot["name"]] = source
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def find(graph: Graph, class_type: str) -> str:
    """Id of the only node of this type."""
    (found,) = (i for i, node in graph.items() if node["class_type"] == class_type)
    return found


def without(graph: Graph, class_type: str, through: str) -> Graph:
    """The graph with a node bypassed: its readers read what its input ``through`` reads."""
    gone = find(graph, class_type)
    replacement = graph[gone]["inputs"][through]
    return {
        i: node
        | {
            "inputs": {
                name: replacement if isinstance(value, list) and value[0] == gone else value
                for name, value in node["inputs"].items()
            }
        }
        for i, node in graph.items()
        if i != gone
    }


def _widgets(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Widget values by name, in the order of the node's declaration."""
    values = iter(node.get("widgets_values") or [])
    found: dict[str, Any] = {}
    for section in ("required", "optional"):
        for name, declared in (info["input"].get(section) or {}).items():
            kind, options = declared[0], (declared[1] if len(declared) > 1 else {})
            is_widget = isinstance(kind, list) or kind in WIDGET_TYPES
            if not is_widget or options.get("forceInput"):
                continue
            value = next(values, MISSING)
            if value is MISSING:  # a newer ComfyUI has more widgets: their defaults apply
                return found
            found[name] = value
            if options.get("control_after_generate"):
                next(values, None)
    return found


def _source(link: int, nodes: dict, links: dict) -> list[Any] | None:
    """``[node id, output slot]`` behind a link, looking through bypassed nodes."""
    _, origin, slot, _, _, kind = links[link]
    node = nodes[origin]
    if node.get("mode", 0) == MUTED:
        return None
    if node.get("mode", 0) != BYPASSED:
        return [str(origin), slot]
    same = [i for i in node.get("inputs", []) if i["type"] == kind and i.get("link") is not None]
    return _source(same[0]["link"], nodes, links) if same else None
