"""Run graphs, each in a process of its own: ``python fresh.py BASE GRAPHS.json``.

ComfyUI and its nodes are loaded once; then every graph runs in a child that is forked before
anything was ever sampled, by ComfyUI's own executor. What the graphs save lies in BASE/output.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from demo.comfy_server import comfyui_path


def load(base):
    """ComfyUI with all its nodes, in this process."""
    path = str(comfyui_path())
    sys.path.insert(0, path)
    os.chdir(path)
    sys.argv = ["main.py", "--base-directory", base, "--cpu", "--use-pytorch-cross-attention"]
    sys.argv += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import main

    return main.start_comfyui()[1]


def execute(server, graph):
    """Run one graph; whether it ended well."""
    import execution

    valid = asyncio.run(execution.validate_prompt("fresh", graph, None))
    limits = {"lru": 0, "ram": 0, "ram_inactive": 0}
    executor = execution.PromptExecutor(server, execution.CacheType.CLASSIC, limits)
    executor.execute(graph, "fresh", {}, valid[2])
    return valid[0] and executor.success


def main(base, graphs):
    server = load(base)
    for graph in json.loads(Path(graphs).read_text()):
        child = os.fork()
        if child == 0:
            os._exit(0 if execute(server, graph) else 1)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"failed: {json.dumps(graph)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
