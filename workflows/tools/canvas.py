"""A workflow as nodes and links, without its places on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

Node = dict[str, Any]


class Link(NamedTuple):
    """From an output slot of a node to an input slot of another."""

    origin: int
    output: int
    target: int
    entry: int


@dataclass(frozen=True)
class Canvas:
    nodes: dict[int, Node]
    links: tuple[Link, ...]

    def into(self, node: int, name: str | None = None) -> Iterator[Link]:
        """Links into a node, or into its input of this name."""
        for link in self.links:
            entry = self.nodes[link.target]["inputs"][link.entry]["name"]
            if link.target == node and name in (None, entry):
                yield link

    def ancestors(self, node: int) -> set[int]:
        """The node and everything that it needs."""
        found = {node}
        for link in self.into(node):
            found |= self.ancestors(link.origin)
        return found


def read(workflow: dict[str, Any]) -> Canvas:
    """Of a file in the format of the browser; its notes are left out."""
    nodes = {n["id"]: n for n in workflow["nodes"] if "Note" not in n["type"]}
    links = (Link(*link[1:5]) for link in workflow["links"])
    kept = (link for link in links if link.origin in nodes and link.target in nodes)
    return Canvas(nodes, tuple(kept))


def samplers(canvas: Canvas) -> list[int]:
    """In the order in which they run."""
    found = [i for i, node in canvas.nodes.items() if is_sampler(node)]
    return sorted(found, key=lambda i: len(canvas.ancestors(i)))


def is_sampler(node: Node) -> bool:
    """By its inputs: there are several node types."""
    names = {entry["name"] for entry in node["inputs"]}
    return "latent_image" in names and bool(names & {"model", "guider"})
