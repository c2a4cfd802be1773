"""Fold a large template into two subgraphs, with LiteAttention between them: what it needs (files,
prompt, size) and what needs it (sampling, decoding). So the whole fits on a screen, and one sees
where LiteAttention goes."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .canvas import Canvas, Link, Node
from .layout import file_node
from .subgraphs import IN, OUT, widget_value

ROW, TEXT = 24, 120  # pixels of a slot or a widget, and more for a prompt


@dataclass(frozen=True)
class Folded:
    """``canvas``: the outside. ``subgraphs``: the definitions, as the file holds them."""

    canvas: Canvas
    subgraphs: tuple[dict[str, Any], ...]


def fold(canvas: Canvas, name: str) -> Folded:
    """Nodes that were in a subgraph of the template, in two of them."""
    patches = [i for i, n in canvas.nodes.items() if n["type"] == "LiteAttentionPatch"]
    inside = {i for i, node in canvas.nodes.items() if node.get("inside")}
    after = {i for i in inside if any(p in canvas.ancestors(i) for p in patches)}
    # What nobody sets and only these read: names of samplers, for example.
    after |= {
        i
        for i in inside - after
        if not any(canvas.into(i))
        and not canvas.nodes[i].get("promoted")
        and all(link.target in after for link in canvas.links if link.origin == i)
    }
    subgraphs = []
    for title, members in (
        ("1. Prompt, size, models", inside - after),
        ("2. Sampling, video", after),
    ):
        canvas, subgraph = _fold_one(canvas, members, title, f"{name}/{title}")
        subgraphs.append(subgraph)
    return Folded(canvas, tuple(subgraphs))


def _fold_one(
    canvas: Canvas, members: set[int], title: str, key: str
) -> tuple[Canvas, dict[str, Any]]:
    """The canvas with a node in place of the members, and the definition of that node."""
    kind = str(uuid.uuid5(uuid.NAMESPACE_URL, f"liteattention/{key}"))
    number = max(canvas.nodes) + 1
    entering = [k for k in canvas.links if k.target in members and k.origin not in members]
    leaving = [k for k in canvas.links if k.origin in members and k.target not in members]
    sources = list(dict.fromkeys((k.origin, k.output) for k in entering))
    ends = list(dict.fromkeys((k.origin, k.output) for k in leaving))
    widgets = _promoted(canvas, members)
    linked = [one for one in widgets if _entry(canvas.nodes[one.node], one.name) is not None]
    # An input that a link outside of the subgraph feeds is a slot already.
    linked = [one for one in linked if not any(canvas.into(one.node, one.name))]
    proxies = [one for one in widgets if _entry(canvas.nodes[one.node], one.name) is None]

    outputs = {end: canvas.nodes[end[0]]["outputs"][end[1]] for end in ends}
    names = _distinct(_slot_name(canvas, source, entering) for source in sources)
    slots: list[dict[str, Any]] = [
        {"name": name, "type": canvas.nodes[origin]["outputs"][output]["type"]}
        for name, (origin, output) in zip(names, sources, strict=True)
    ]
    # Of those that are widgets, too: what is in a widget while a link feeds it counts for nothing,
    # but it has a place among the values.
    fed = {k: _fed_widget(canvas, source, entering) for k, source in enumerate(sources)}
    for name, one in zip(_distinct([one.name for one in linked], taken=names), linked, strict=True):
        node = canvas.nodes[one.node]
        entry = node["inputs"][_entry(node, one.name)]
        slots.append({"name": name, "type": entry["type"], "label": one.label})

    inner = [k for k in canvas.links if k.origin in members and k.target in members]
    inner += [Link(IN, sources.index((k.origin, k.output)), k.target, k.entry) for k in entering]
    inner += [
        Link(IN, len(sources) + k, one.node, _entry(canvas.nodes[one.node], one.name) or 0)
        for k, one in enumerate(linked)
    ]
    inner += [Link(*end, OUT, k) for k, end in enumerate(ends)]
    called = _distinct(_slot_name(canvas, end, leaving) for end in ends)
    given = [
        {"name": name, "type": output["type"]}
        for name, output in zip(called, outputs.values(), strict=True)
    ]
    definition = _definition(canvas, members, inner, kind, title, slots, given)

    texts = [str(widget_value(canvas.nodes[one.node], one.name)) for one in widgets]
    rows = max(len(sources), len(ends)) + len(widgets)
    instance: Node = {
        "type": kind,
        "title": title,
        "size": [0, ROW * rows + 20 + TEXT * any(len(text) > 80 for text in texts)],
        "inputs": [
            dict(slot)
            | ({"widget": {"name": slot["name"]}} if fed.get(k, True) is not None else {})
            for k, slot in enumerate(slots)
        ],
        "outputs": given,
        "properties": {
            "proxyWidgets": [[str(one.node), one.name] for one in proxies],
        },
        "widgets_values": [
            widget_value(canvas.nodes[node], widget)
            for node, widget in [
                *(one for one in fed.values() if one is not None),
                *((one.node, one.name) for one in linked),
            ]
        ],
    }
    nodes = {i: node for i, node in canvas.nodes.items() if i not in members} | {number: instance}
    links = [k for k in canvas.links if k.origin not in members and k.target not in members]
    links += [Link(*source, number, k) for k, source in enumerate(sources)]
    links += [k._replace(origin=number, output=ends.index((k.origin, k.output))) for k in leaving]
    return Canvas(nodes, tuple(links)), definition


@dataclass(frozen=True)
class _Widget:
    order: int
    node: int
    name: str
    label: str


def _promoted(canvas: Canvas, members: Iterable[int]) -> list[_Widget]:
    """Widgets of the members that the template shows on the outside, in its order."""
    found = [
        _Widget(order, i, name, label)
        for i in members
        for order, name, label in canvas.nodes[i].get("promoted", ())
    ]
    return sorted(found, key=lambda one: one.order)


def _entry(node: Node, widget: str) -> int | None:
    """Where a link into the widget ends."""
    for k, entry in enumerate(node["inputs"]):
        if entry.get("widget", {}).get("name") == widget:
            return k
    return None


def _slot_name(canvas: Canvas, source: tuple[int, int], links: Iterable[Link]) -> str:
    """A slot is called as what it feeds, unless it feeds several things."""
    fed = {
        canvas.nodes[k.target]["inputs"][k.entry]["name"]
        for k in links
        if (k.origin, k.output) == source
    }
    return fed.pop() if len(fed) == 1 else canvas.nodes[source[0]]["outputs"][source[1]]["name"]


def _fed_widget(
    canvas: Canvas, source: tuple[int, int], entering: Iterable[Link]
) -> tuple[int, str] | None:
    """Node and name of the widget that a source feeds, or None where it feeds a plain input."""
    for link in entering:
        if (link.origin, link.output) == source:
            widget = canvas.nodes[link.target]["inputs"][link.entry].get("widget")
            return (link.target, widget["name"]) if widget else None
    return None


def _distinct(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    used, found = set(taken), []
    for name in names:
        number = 1
        while (one := name if number == 1 else f"{name}_{number}") in used:
            number += 1
        used.add(one)
        found.append(one)
    return found


def _definition(
    canvas: Canvas,
    members: set[int],
    links: list[Link],
    kind: str,
    title: str,
    slots: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
) -> dict[str, Any]:
    order = sorted(members, key=lambda i: (len(canvas.ancestors(i)), i))
    boxes = {i: (*_pair(canvas.nodes[i]["pos"]), *_pair(canvas.nodes[i]["size"])) for i in members}
    left = min(x for x, *_ in boxes.values())
    right = max(x + width for x, _, width, _ in boxes.values())
    top = min(y for _, y, *_ in boxes.values())

    def slot(k: int, one: dict[str, Any], end: int, x: int) -> dict[str, Any]:
        through = [n for n, link in enumerate(links, 1) if (link[0], link[1]) == (end, k)]
        through += [n for n, link in enumerate(links, 1) if (link[2], link[3]) == (end, k)]
        number = str(uuid.uuid5(uuid.UUID(kind), f"{end}/{k}"))
        return {"id": number, **one, "linkIds": through, "pos": [x, top + 24 + 20 * k]}

    return {
        "id": kind,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": max(members),
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": title,
        "inputNode": {"id": IN, "bounding": [left - 260, top, 160, 40 + 20 * len(slots)]},
        "outputNode": {"id": OUT, "bounding": [right + 100, top, 160, 40 + 20 * len(outputs)]},
        "inputs": [slot(k, one, IN, left - 120) for k, one in enumerate(slots)],
        "outputs": [slot(k, one, OUT, right + 124) for k, one in enumerate(outputs)],
        "widgets": [],
        "nodes": [
            file_node(i, canvas.nodes[i], links, boxes[i], order.index(i)) for i in sorted(members)
        ],
        "groups": [],
        "links": [
            {
                "id": n,
                "origin_id": link.origin,
                "origin_slot": link.output,
                "target_id": link.target,
                "target_slot": link.entry,
                "type": slots[link.output]["type"]
                if link.origin == IN
                else canvas.nodes[link.origin]["outputs"][link.output]["type"],
            }
            for n, link in enumerate(links, 1)
        ],
        "extra": {},
    }


def _pair(value: Any) -> tuple[int, int]:
    """Older files hold ``{"0": x, "1": y}``."""
    both = value if isinstance(value, list) else (value["0"], value["1"])
    return round(both[0]), round(both[1])
