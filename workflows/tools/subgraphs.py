"""Unfold templates that hide their nodes in a subgraph: LiteAttention goes between those nodes."""

from __future__ import annotations

import copy
from typing import Any

IN, OUT = -10, -20  # the ends of a subgraph, as its links name them

Workflow = dict[str, Any]
Node = dict[str, Any]
NONE = object()
CONTROLS = ("fixed", "randomize", "increment", "decrement")
#: Of nodes whose inputs don't list all widgets.
WIDGETS = {
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", "steps", "cfg", "sampler_name", "scheduler"),
        *("start_at_step", "end_at_step", "return_with_leftover_noise"),
    ),
}


def unfold(workflow: Workflow) -> Workflow:
    """The workflow with the nodes of its subgraphs in their place. They are marked as ``inside``,
    and list what was shown of them on the outside (``promoted``: order, name, label)."""
    while True:
        folded = {sub["id"]: sub for sub in workflow.get("definitions", {}).get("subgraphs", ())}
        instance = next((n for n in workflow["nodes"] if n["type"] in folded), None)
        if instance is None:
            return _relinked(workflow)
        workflow = _unfold_one(workflow, instance, folded[instance["type"]])


def _unfold_one(workflow: Workflow, instance: dict[str, Any], sub: Workflow) -> Workflow:
    sub = copy.deepcopy(sub)
    shown = _shown_outside(instance, sub)
    start = max(n["id"] for n in workflow["nodes"])
    new = {node["id"]: start + i for i, node in enumerate(sub["nodes"], 1)}
    inside = [_ends(link) for link in sub["links"]]

    links = [
        (new[origin], output, new[target], entry)
        for origin, output, target, entry in inside
        if origin != IN and target != OUT
    ]
    for origin, output, target, entry in (link[1:5] for link in workflow["links"]):
        if target == instance["id"]:
            name = instance["inputs"][entry]["name"]
            slot = [one["name"] for one in sub["inputs"]].index(name)
            ends = [(new[t], e) for o, s, t, e in inside if (o, s) == (IN, slot)]
            links += [(origin, output, *end) for end in ends]
        elif origin == instance["id"]:
            (source,) = ((new[o], s) for o, s, t, slot in inside if (t, slot) == (OUT, output))
            links.append((*source, target, entry))
        else:
            links.append((origin, output, target, entry))
    nodes = [node for node in workflow["nodes"] if node is not instance]
    nodes += [
        node | {"id": new[node["id"]], "inside": True, "promoted": shown.get(node["id"], [])}
        for node in sub["nodes"]
    ]
    numbered = [[number, *link, None] for number, link in enumerate(links, 1)]
    return workflow | {"nodes": nodes, "links": numbered}


def _relinked(workflow: Workflow) -> Workflow:
    """The slots of the nodes name the links that there are now."""
    nodes = copy.deepcopy(workflow["nodes"])
    by_id = {node["id"]: node for node in nodes}
    for node in nodes:
        for entry in node.get("inputs", ()):
            entry["link"] = None
        for output in node.get("outputs", ()):
            output["links"] = []
    links = []
    for number, origin, output, target, entry, _ in workflow["links"]:
        if origin in by_id and target in by_id:
            given = by_id[origin]["outputs"][output]
            given["links"].append(number)
            by_id[target]["inputs"][entry]["link"] = number
            links.append([number, origin, output, target, entry, given.get("type")])
    return workflow | {"nodes": nodes, "links": links}


def _shown_outside(instance: Node, sub: Workflow) -> dict[int, list[tuple[int, str, str]]]:
    """By node inside: order, name and label of the widgets that the subgraph shows on its outside.
    The values there are the ones that count: the nodes get them."""
    nodes = {node["id"]: node for node in sub["nodes"]}
    values = iter(instance.get("widgets_values") or ())
    shown: dict[int, list[tuple[int, str, str]]] = {}
    for order, slot in enumerate(sub["inputs"]):
        ends = [link for link in map(_ends, sub["links"]) if link[:2] == (IN, order)]
        entries = [(nodes[t], nodes[t]["inputs"][e]) for _, _, t, e in ends if t in nodes]
        widgets = [(node, entry["widget"]["name"]) for node, entry in entries if "widget" in entry]
        if not widgets:
            continue
        value = next(values, NONE)
        for node, name in widgets:
            if value is not NONE:
                set_widget_value(node, name, value)
        node, name = widgets[0]
        shown.setdefault(node["id"], []).append((order, name, slot.get("label") or slot["name"]))
    for order, (number, name) in enumerate(instance.get("properties", {}).get("proxyWidgets", ())):
        there = [one for _, one, _ in shown.get(int(number), ())]
        if int(number) in nodes and name not in there:
            shown.setdefault(int(number), []).append((len(sub["inputs"]) + order, name, name))
    left = [value for value in values if value not in (None, "")]
    if left:
        raise ValueError(f"{sub['name']}: {left[0]!r} is set outside of the subgraph only")
    return shown


def widget_value(node: Node, name: str) -> Any:
    return node["widgets_values"][_index(node, name)]


def set_widget_value(node: Node, name: str, value: Any) -> None:
    values = list(node["widgets_values"])
    values[_index(node, name)] = value
    node["widgets_values"] = values


def _index(node: Node, name: str) -> int:
    """Place of a widget's value: in the order of the names, where seeds bring a second one."""
    listed = [entry["widget"]["name"] for entry in node["inputs"] if "widget" in entry]
    named: dict[str, Any] = node.get("widgets_values_named") or {}
    names = list(named) or list(WIDGETS.get(node["type"], listed))
    values, place = node["widgets_values"], 0
    for one in names:
        if one == name:
            return place
        place += 1
        if place < len(values) and values[place] in CONTROLS and "control" not in one:
            place += "control_after_generate" not in names
    raise ValueError(f"{node['type']} has no widget {name!r}")


def _ends(link: dict[str, Any]) -> tuple[int, int, int, int]:
    return link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"]
