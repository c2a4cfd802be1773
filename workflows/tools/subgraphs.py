"""Unfold templates that hide their nodes in a subgraph: LiteAttention goes between those nodes."""

from __future__ import annotations

from typing import Any

IN, OUT = -10, -20  # the ends of a subgraph, as its links name them

Workflow = dict[str, Any]


def unfold(workflow: Workflow) -> Workflow:
    """The workflow with the nodes of its subgraphs in their place."""
    while True:
        folded = {sub["id"]: sub for sub in workflow.get("definitions", {}).get("subgraphs", ())}
        instance = next((n for n in workflow["nodes"] if n["type"] in folded), None)
        if instance is None:
            return workflow
        workflow = _unfold_one(workflow, instance, folded[instance["type"]])


def _unfold_one(workflow: Workflow, instance: dict[str, Any], sub: Workflow) -> Workflow:
    _check_values(instance, sub)
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
    nodes += [node | {"id": new[node["id"]]} for node in sub["nodes"]]
    numbered = [[number, *link, None] for number, link in enumerate(links, 1)]
    return workflow | {"nodes": nodes, "links": numbered}


def _check_values(instance: dict[str, Any], sub: Workflow) -> None:
    """The values that a subgraph shows on its outside are those inside, which are the ones kept."""
    inside = [value for node in sub["nodes"] for value in node.get("widgets_values") or ()]
    for value in instance.get("widgets_values") or ():
        if value not in inside:
            raise ValueError(f"{sub['name']}: {value!r} is set outside of the subgraph only")


def _ends(link: dict[str, Any]) -> tuple[int, int, int, int]:
    return link["origin_id"], link["origin_slot"], link["target_id"], link["target_slot"]
