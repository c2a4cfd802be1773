"""Write down the nodes that a running ComfyUI has, for checks against one that does not have them.

    python -m workflows.tools.record_nodes http://127.0.0.1:8188 tests/comfy/newer_nodes.json

Only those of the workflows that are made from newer templates, and of these only what a graph
needs: names and types of inputs and outputs, and what can be chosen.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from .make_workflows import FOLDER, NEWER, RECIPES
from .subgraphs import unfold

OPTIONS = ("control_after_generate", "forceInput", "options")
NOT_NODES = ("Note", "MarkdownNote")


def main() -> None:
    address, target = sys.argv[1:]
    info = _get(f"{address}/object_info")
    types = {
        node["type"]
        for recipe in RECIPES
        if recipe.made_from == NEWER
        for node in unfold(
            json.loads((FOLDER / f"liteattention_{recipe.name}.json").read_text("utf-8"))
        )["nodes"]
    }
    kept = sorted(t for t in types if t not in NOT_NODES and not t.startswith("LiteAttention"))
    version = _get(f"{address}/system_stats")["system"]["comfyui_version"]
    missing = [kind for kind in kept if kind not in info]
    if missing:
        raise SystemExit(f"this ComfyUI has no {', '.join(missing)}")
    nodes = (f" {json.dumps(kind)}: {json.dumps(brief(info[kind]))}" for kind in kept)
    text = f'{{"comfyui": "{version}", "nodes": {{\n' + ",\n".join(nodes) + "\n}}\n"
    Path(target).write_text(text, encoding="utf-8", newline="\n")


def brief(node: dict[str, Any]) -> dict[str, Any]:
    return {
        "input": {
            section: {name: _brief_input(declared) for name, declared in entries.items()}
            for section, entries in node["input"].items()
            if section in ("required", "optional")
        },
        "output": node["output"],
        "output_name": node["output_name"],
    }


def _brief_input(declared: list[Any]) -> list[Any]:
    kind, found = declared[0], declared[1] if len(declared) > 1 else {}
    kept = {key: found[key] for key in OPTIONS if key in found}
    if "options" in kept:  # those of a dynamic combo bring inputs of their own
        kept["options"] = [o["key"] if isinstance(o, dict) else o for o in kept["options"]]
    return [kind, kept]


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as reply:
        return json.loads(reply.read())


if __name__ == "__main__":
    main()
