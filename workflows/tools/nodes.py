"""The nodes that are put into a template."""

from __future__ import annotations

from typing import Any

from .canvas import Node

BROWN, GREEN, RED = ("#432", "#653"), ("#232", "#353"), ("#322", "#533")


def patch_node(of: str = "") -> Node:
    return _our_node(
        "LiteAttentionPatch",
        f"LiteAttention ({of})" if of else "",
        inputs=(("model", "MODEL"), ("control", "LITEATTENTION_CONTROL")),
        outputs=(("MODEL", "MODEL"),),
        widgets=["Balanced"],
        height=150,  # room for the text that it shows while it runs
    )


def report_node(of: str = "") -> Node:
    return _our_node(
        "LiteAttentionReport",
        f"LiteAttention Report ({of})" if of else "",
        inputs=(("model", "MODEL"), ("latent", "LATENT")),
        outputs=(("latent", "LATENT"), ("map", "IMAGE"), ("text", "STRING"), ("charts", "IMAGE")),
        widgets=["dark"],
        height=350,  # grows when there are pictures
    )


def compare_node() -> Node:
    return _our_node(
        "LiteAttentionCompare",
        "",
        inputs=(("reference", "IMAGE"), ("candidate", "IMAGE")),
        outputs=(("comparison", "IMAGE"), ("text", "STRING")),
        widgets=[8.0],
        height=350,
    )


def _our_node(
    kind: str,
    title: str,
    inputs: tuple[tuple[str, str], ...],
    outputs: tuple[tuple[str, str], ...],
    widgets: list[Any],
    height: int,
) -> Node:
    return {
        "type": kind,
        "size": [0, height],
        "inputs": [{"name": name, "type": of} for name, of in inputs],
        "outputs": [{"name": name, "type": of} for name, of in outputs],
        "properties": {},
        "widgets_values": widgets,
        **({"title": title} if title else {}),
        **colours(BROWN),
    }


def note_node(text: str, height: int) -> Node:
    return {
        "type": "MarkdownNote",
        "title": "Read me",
        "size": [0, height],
        "inputs": [],
        "outputs": [],
        "widgets_values": [text],
        **colours(BROWN),
    }


def colours(pair: tuple[str, str]) -> dict[str, str]:
    return {"color": pair[0], "bgcolor": pair[1]}
