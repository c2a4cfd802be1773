"""Where the nodes go on the screen, and the file that ComfyUI opens."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .canvas import Canvas, Link, Node, is_sampler, samplers

LEFT, TOP, TITLE = 40, 80, 30
GAP, BELOW = 40, 20  # beside and below a node


def to_file(
    canvas: Canvas, name: str, note: Node, subgraphs: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The file that ComfyUI opens: nodes with their places, links numbered from 1."""
    number = max(canvas.nodes) + 1
    canvas = replace(canvas, nodes=canvas.nodes | {number: note})
    links = sorted(canvas.links)
    placed = place(canvas, number)
    order = sorted(canvas.nodes, key=lambda i: (len(canvas.ancestors(i)), i))
    nodes = [file_node(i, canvas.nodes[i], links, placed[i], order.index(i)) for i in placed]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"liteattention/{name}")),
        "revision": 0,
        "last_node_id": number,
        "last_link_id": len(links),
        "nodes": nodes,
        "links": [
            [n, *link, canvas.nodes[link.origin]["outputs"][link.output]["type"]]
            for n, link in enumerate(links, 1)
        ],
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
        **({"definitions": {"subgraphs": list(subgraphs)}} if subgraphs else {}),
    }


def file_node(
    i: int, node: Node, links: list[Link], box: tuple[int, int, int, int], order: int
) -> Node:
    ends_in = {link.entry: n for n, link in enumerate(links, 1) if link.target == i}
    ends: dict[int, list[int]] = {}
    for n, link in enumerate(links, 1):
        if link.origin == i:
            ends.setdefault(link.output, []).append(n)
    properties = node.get("properties", {})
    kept = {k: properties[k] for k in ("models", "proxyWidgets") if k in properties}
    if "Note" not in node["type"] and not is_subgraph(node):
        kept["Node name for S&R"] = node["type"]
    return {
        "id": i,
        "type": node["type"],
        "pos": list(box[:2]),
        "size": list(box[2:]),
        "flags": {},
        "order": order,
        "mode": node.get("mode", 0),
        "inputs": [
            {"name": entry["name"], "type": entry["type"], "link": ends_in.get(k)}
            # The place where a value can come from another node, in place of its widget.
            | {key: entry[key] for key in ("widget", "label") if key in entry}
            for k, entry in enumerate(node["inputs"])
        ],
        "outputs": [
            {"name": o["name"], "type": o["type"], "links": ends.get(k, []), "slot_index": k}
            for k, o in enumerate(node["outputs"])
        ],
        **{key: node[key] for key in ("title", "color", "bgcolor") if node.get(key)},
        "properties": kept,
        "widgets_values": list(node["widgets_values"]),
    }


def place(canvas: Canvas, note: int) -> dict[int, tuple[int, int, int, int]]:
    """``x, y, width, height`` of every node: columns of stacked nodes, from left to right."""
    boxes, x = {}, LEFT
    for width, column in _columns(canvas, note):
        y = TOP
        for i in column:
            height = _height(canvas.nodes[i])
            boxes[i] = (x, y, width, height)
            y += height + BELOW + TITLE
        x += width + GAP
    return boxes


def _columns(canvas: Canvas, note: int) -> list[tuple[int, list[int]]]:
    """Files, prompts and size, each sampler with its model, reports, the video. What is compared
    is sampled in one column: in a view of the whole the texts can still be read."""
    nodes = canvas.nodes
    if any(map(is_subgraph, nodes.values())):
        return _folded_columns(canvas, note)
    order = sorted(nodes, key=lambda i: (len(canvas.ancestors(i)), nodes[i].get("pos", [0, 0])[1]))
    files = [i for i in order if not any(canvas.into(i)) and _has(nodes[i], FILES)]
    reports = [i for i in order if nodes[i]["type"] == "LiteAttentionReport"]
    compared = [i for i in order if nodes[i]["type"] == "LiteAttentionCompare"]
    used = {note, *files, *reports, *compared}
    runs = []
    for sampler in samplers(canvas):
        needs = canvas.ancestors(sampler) - used
        run = [i for i in order if i in needs and not _has(nodes[i], CONDITIONS)]
        run.sort(key=lambda i: (is_sampler(nodes[i]), not _has(nodes[i], {"MODEL", "GUIDER"})))
        runs.append(run)
        used |= set(runs[-1])
    runs = [[i for run in runs for i in run]] if compared else runs
    conditions = [i for i in order if _has(nodes[i], CONDITIONS) and i not in used]
    conditions.sort(key=lambda i: (_has(nodes[i], CONTROL), nodes[i].get("title") == "Video size"))
    rest = [i for i in order if i not in used and i not in conditions]
    frames = [i for i in rest if compared and i in canvas.ancestors(compared[0])]
    rest = [i for i in rest if i not in frames]
    if compared:
        columns = [(310, files), (310, conditions), *((290, run) for run in runs)]
        columns += [(340, frames + reports), (360, compared + rest)]
    else:
        columns = [(360, files), (360, conditions), *((320, run) for run in runs)]
        columns.append((420, reports + rest))
    # The note where there is most room: the whole has to stay legible on a screen.
    min(columns, key=lambda column: _heights(canvas, column[1]))[1].append(note)
    return columns


def _heights(canvas: Canvas, column: Sequence[int]) -> int:
    return sum(_height(canvas.nodes[i]) + BELOW + TITLE for i in column)


def _folded_columns(canvas: Canvas, note: int) -> list[tuple[int, list[int]]]:
    """The note and what is loaded, what comes before LiteAttention, LiteAttention and what comes
    after it, reports, the video."""
    nodes = canvas.nodes
    before, after = (i for i in sorted(nodes) if is_subgraph(nodes[i]))
    patches = [i for i, n in nodes.items() if n["type"] == "LiteAttentionPatch"]
    reports = [i for i, n in nodes.items() if n["type"] == "LiteAttentionReport"]
    videos = [i for i in nodes if after in canvas.ancestors(i) - {i} and i not in reports]
    used = {note, before, after, *patches, *reports, *videos}
    rest = sorted(i for i in nodes if i not in used)
    loaded = [i for i in rest if not any(canvas.into(i)) and _has(nodes[i], {"IMAGE"})]
    columns = [(400, [note, *loaded]), (400, [before]), (320, [*patches, after])]
    small = [i for i in rest if i not in loaded]
    min(columns, key=lambda column: _heights(canvas, column[1]))[1].extend(small)
    return [*columns, (420, reports + videos)]


def is_subgraph(node: Node) -> bool:
    return "proxyWidgets" in node.get("properties", {})


#: Outputs of nodes that read files, and of those that say what is drawn and what may be skipped.
FILES = {"MODEL", "CLIP", "VAE", "CLIP_VISION", "IMAGE"}
CONTROL = {"LITEATTENTION_CONTROL"}
CONDITIONS = {"CONDITIONING", "CLIP_VISION_OUTPUT", "LATENT"} | CONTROL


def _has(node: Node, kinds: set[str]) -> bool:
    """Whether an output of the node is one of these; a sampler is none of them."""
    return not is_sampler(node) and any(o["type"] in kinds for o in node["outputs"])


#: Pixels, where the templates leave much room.
HEIGHTS = {
    "LoadImage": 314,
    "SaveVideo": 240,
    "SaveAnimatedWEBP": 340,
    "KSampler": 262,
    "KSamplerAdvanced": 334,
    "SamplerCustomAdvanced": 126,
}


def _height(node: Node) -> int:
    if node["type"] in HEIGHTS:
        return HEIGHTS[node["type"]]
    size = node["size"]
    return round(max(size[1] if isinstance(size, list) else size["1"], 46))
