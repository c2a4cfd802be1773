"""Videos from a running ComfyUI server, by a workflow that contains a LiteAttention node.

Uses the workflow's own prompt, or others in its place, and sets every seed in it. Frames come back
as PNG files, whatever the workflow saves. Dense is the workflow without the node, with whatever
attention the server was started with: use another folder for one with ``--use-sage-attention``.
"""

from __future__ import annotations

import io
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from comfyui_liteattention.presets import PRESETS
from demo.workflow import Graph, load_workflow, to_graph, without

from .store import DENSE, Job, Made

WARM_UP_SEED = 2**31
PATCH, REPORT, SAVE = "LiteAttentionPatch", "LiteAttentionReport", "liteattention_frames"
_POLL = 0.5  # seconds
_SEEDS, _TEXTS = ("seed", "noise_seed"), ("text", "prompt")


class ComfyHost:
    """``address``: of the server, such as ``127.0.0.1:8188``."""

    def __init__(self, address: str, workflow: Path) -> None:
        self.address = address.removeprefix("http://").rstrip("/")
        found = load_workflow(workflow)
        self.graph = to_graph(found, self._get("/object_info")) if "nodes" in found else found

    def variants(self) -> list[str]:
        return [DENSE, *PRESETS]

    def prompts(self) -> list[str]:
        """The workflow's own."""
        node, name = text_of(self.graph)
        return [self.graph[node]["inputs"][name]]

    def warm_up(self, variant: str, prompt: str) -> None:
        """A whole run, because workflows set the number of steps in too many ways to change it.
        Its seed is one that no video uses, or ComfyUI would take that video from its cache."""
        self.run(Job(variant, prompt, WARM_UP_SEED))

    def run(self, job: Job) -> Made:
        reply = self._post("/prompt", {"prompt": graph_of(self.graph, job)})
        history = self._wait(reply["prompt_id"])
        if SAVE not in history["outputs"]:
            raise RuntimeError(f"ComfyUI made no frames: {history['status']}")
        frames = [self._frame(image) for image in history["outputs"][SAVE]["images"]]
        return Made(torch.from_numpy(np.stack(frames)), {"seconds": seconds_of(history)})

    def _wait(self, number: str) -> dict[str, Any]:
        while True:
            history = self._get(f"/history/{number}").get(number)
            if history is not None and history["status"]["completed"]:
                return dict(history)
            if history is not None:
                raise RuntimeError(f"ComfyUI could not run it: {history['status']['messages'][-1]}")
            time.sleep(_POLL)

    def _frame(self, image: dict[str, str]) -> np.ndarray:
        query = urllib.parse.urlencode(image)
        with urllib.request.urlopen(f"http://{self.address}/view?{query}", timeout=60) as reply:
            return np.asarray(Image.open(io.BytesIO(reply.read())).convert("RGB"))

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as reply:
            return json.loads(reply.read())

    def _post(self, path: str, data: dict[str, Any]) -> Any:
        kind = {"Content-Type": "application/json"}
        body = json.dumps(data).encode()
        request = urllib.request.Request(f"http://{self.address}{path}", body, kind)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())


def graph_of(workflow: Graph, job: Job) -> Graph:
    """The workflow as this job runs it, reduced to the nodes that its frames depend on."""
    graph: Graph = json.loads(json.dumps(workflow))
    node, name = text_of(graph)
    graph[node]["inputs"][name] = job.prompt
    for part in graph.values():
        for seed in set(_SEEDS) & set(part["inputs"]):
            part["inputs"][seed] = job.seed
    kinds = {part["class_type"] for part in graph.values()}
    if REPORT in kinds:
        graph = without(graph, REPORT, "latent")
    if job.variant == DENSE:
        graph = without(graph, PATCH, "model")
    else:
        for part in graph.values():
            if part["class_type"] == PATCH:
                part["inputs"] = {"model": part["inputs"]["model"], "preset": job.variant}
    images = {"images": frames_of(graph), "filename_prefix": f"liteattention/{job.key}"}
    graph[SAVE] = {"class_type": "SaveImage", "inputs": images}
    needed = ancestors(graph, SAVE)
    return {i: part for i, part in graph.items() if i in needed}


def text_of(graph: Graph) -> tuple[str, str]:
    """The node and the input that hold the positive prompt. ValueError if there is none."""
    for part in graph.values():
        link = part["inputs"].get("positive")
        for i in ancestors(graph, link[0]) if isinstance(link, list) else ():
            for name in _TEXTS:
                if isinstance(graph[i]["inputs"].get(name), str):
                    return i, name
    raise ValueError("the workflow has no text behind an input called positive")


def frames_of(graph: Graph) -> list[Any]:
    """The frames that the workflow saves: the link of an input called images."""
    for part in graph.values():
        if isinstance(link := part["inputs"].get("images"), list):
            return link
    raise ValueError("the workflow saves no images")


def ancestors(graph: Graph, node: str) -> list[str]:
    """A node and all nodes that it depends on, the nearest first."""
    found = [node]
    for i in found:
        links = (value[0] for value in graph[i]["inputs"].values() if isinstance(value, list))
        found += [link for link in dict.fromkeys(links) if link in graph and link not in found]
    return found


def seconds_of(history: dict[str, Any]) -> float:
    """The seconds that a run took, by the server's own clock."""
    times = {name: data["timestamp"] for name, data in history["status"]["messages"]}
    return float(times["execution_success"] - times["execution_start"]) / 1000
