"""A real ComfyUI on this machine: start it, run graphs in it, stop it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import websocket

REPOSITORY = Path(__file__).resolve().parent.parent
START_SECONDS = 180
RUN_SECONDS = 1200
WEIGHTS = "liteattention_demo_wan.safetensors"

Graph = dict[str, dict[str, Any]]
Progress = Callable[[int, int], None]


def comfyui_path() -> Path:
    """``COMFYUI_PATH``, or the tree that ``dev.py`` set up."""
    path = Path(os.environ.get("COMFYUI_PATH") or REPOSITORY / ".dev" / "comfyui")
    if not (path / "main.py").is_file():
        raise FileNotFoundError(
            f"No ComfyUI in {path}. Run `python dev.py setup`, or set COMFYUI_PATH to a checkout."
        )
    return path


def comfyui_version(path: Path) -> str:
    match = re.search(r'"([\d.]+)"', (path / "comfyui_version.py").read_text())
    return match.group(1) if match else "unknown"


def make_base(base: Path, nodes: bool = True) -> Path:
    """A ComfyUI base directory with the demo's weights and, with ``nodes``, our two node packs."""
    for name in ("models/diffusion_models", "custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    weights = REPOSITORY / "demo" / "weights"
    links = {f"models/diffusion_models/{WEIGHTS}": weights / WEIGHTS}
    if nodes:
        links["custom_nodes/liteattention"] = REPOSITORY
        links["custom_nodes/liteattention_demo"] = REPOSITORY / "demo"
    for name, target in links.items():
        if not (base / name).exists():
            (base / name).symlink_to(target)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(exist_ok=True)
    settings.write_text('{"Comfy.TutorialCompleted": true}')
    return base


@dataclass
class Finished:
    """What a graph gave: ``outputs`` by node id, and the seconds that each node took."""

    outputs: dict[str, dict[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None


class PromptRefusedError(ValueError):
    """The server did not accept the graph; the message holds its words."""


class ComfyServer:
    """One ComfyUI process. Use it as a context manager."""

    def __init__(self, base: Path, log: Path, extra: tuple[str, ...] = ()) -> None:
        self.path = comfyui_path()
        self.base = base
        self.log = log
        self.extra = extra
        self.port = _free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._client = uuid.uuid4().hex

    def __enter__(self) -> Self:
        # fmt: off
        command = [
            sys.executable, str(self.path / "main.py"), "--base-directory", str(self.base),
            "--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes",
            "--use-pytorch-cross-attention", "--database-url", "sqlite:///:memory:",
            *_device_flags(), *self.extra,
        ]
        # fmt: on
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.path
            )
        try:
            self._wait_until_up()
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as reply:
            return json.loads(reply.read())

    def post(self, path: str, data: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            json.dumps(data).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                body = reply.read()
                return json.loads(body) if body else None
        except urllib.error.HTTPError as error:
            raise PromptRefusedError(error.read().decode()) from None

    def run(self, graph: Graph, progress: Progress | None = None) -> Finished:
        """Queue an API-format graph and wait for its end."""
        channel = websocket.create_connection(
            f"ws://{self.address}/ws?clientId={self._client}", timeout=RUN_SECONDS
        )
        try:
            reply = self.post("/prompt", {"prompt": graph, "client_id": self._client})
            seconds, error = _follow(channel, reply["prompt_id"], progress)
        finally:
            channel.close()
        history = self.get(f"/history/{reply['prompt_id']}")[reply["prompt_id"]]
        return Finished(history["outputs"], seconds, error)

    def output_file(self, saved: dict[str, str]) -> Path:
        """The file behind an entry of a node's ``images`` output."""
        return self.base / saved["type"] / saved["subfolder"] / saved["filename"]

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.3)
        tail = self.log.read_text()[-2000:]
        raise RuntimeError(f"ComfyUI did not start; the end of {self.log}:\n{tail}")


def _follow(
    channel: websocket.WebSocket, prompt_id: str, progress: Progress | None
) -> tuple[dict[str, float], str | None]:
    """Read the server's messages until the prompt ends: seconds per node, and an error if any."""
    seconds: dict[str, float] = {}
    node, since, error = None, time.perf_counter(), None
    while True:
        message = channel.recv()
        if isinstance(message, bytes):
            continue  # a preview picture
        event = json.loads(message)
        kind, data = event["type"], event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        if kind == "executing":
            now = time.perf_counter()
            if node is not None:
                seconds[node] = seconds.get(node, 0.0) + now - since
            node, since = data["node"], now
            if node is None:  # the last message, sent once the history is written
                return seconds, error
        elif kind == "progress" and progress:
            progress(data["value"], data["max"])
        elif kind == "execution_error":
            error = f"{data['exception_type']}: {data['exception_message']}".strip()
        elif kind == "execution_interrupted":
            error = "interrupted"


def _device_flags() -> tuple[str, ...]:
    import torch

    return () if torch.cuda.is_available() else ("--cpu",)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
