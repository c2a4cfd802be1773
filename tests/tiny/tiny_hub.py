"""A small model hub on this machine: what huggingface_hub's client needs to fetch one file.

It answers as huggingface.co does. The client is the real one, sent here by ``HF_ENDPOINT`` as it is
to any mirror.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "profile.safetensors"
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
STORE = re.compile(r"/store/([^/]+/[^/]+)")


@dataclass
class File:
    """The only file of a repository, and what is wrong with how it is served."""

    data: bytes
    stored: bool = False  # as files of Git LFS are: the client is sent to another host
    size_said: int | None = None  # at first, by HEAD; the true one unless given
    size_sent: int | None = None  # with the contents
    status: int = 200
    error: str = ""  # in the hub's words
    silent: str = ""  # HEAD or GET: it is never answered
    foreign: bool = False  # without the headers that make it a hub's


class TinyHub(ThreadingHTTPServer):
    """Serves repositories at one commit while it is entered, and notes what is asked of each."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, File]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.asked: dict[str, list[str]] = {name: [] for name in repositories}
        self.closing = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that has gone away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    server: TinyHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        if stored := STORE.fullmatch(self.path):
            return self.send(self.noted(stored[1]))
        asked = RESOLVE.fullmatch(self.path)
        if asked is None:  # the client also asks for other things
            return self.answer(404)
        repository, commit, name = asked.groups()
        if repository not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        if commit != COMMIT:
            return self.refuse(404, "RevisionNotFound")
        if name != NAME:
            return self.refuse(404, "EntryNotFound")
        file = self.noted(repository)
        if file.silent == self.command:
            self.server.closing.wait()
            self.close_connection = True
        elif file.status != 200:
            self.refuse(file.status, file.error)
        elif file.stored:
            self.send_to_the_store(file, repository)
        else:
            self.send(file)

    def do_GET(self):
        self.do_HEAD()

    def noted(self, repository: str) -> File:
        self.server.asked[repository].append(self.command)
        return self.server.repositories[repository]

    def answer(self, status: int, length: int = 0, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def refuse(self, status: int, error: str) -> None:
        words = {"X_Error_Code": error, "X_Error_Message": f"This is {error}."}
        self.answer(status, **(words if error else {}))

    def send_to_the_store(self, file: File, repository: str) -> None:
        self.answer(
            302,
            # The same server, but another host for the client.
            Location=f"http://localhost:{self.server.server_port}/store/{repository}",
            X_Linked_Size=str(len(file.data) if file.size_said is None else file.size_said),
            X_Linked_ETag=f'"{hashlib.sha256(file.data).hexdigest()}"',
            X_Repo_Commit=COMMIT,
        )

    def send(self, file: File) -> None:
        said = file.size_said if self.command == "HEAD" else file.size_sent
        headers = {"ETag": f'"{hashlib.sha1(file.data).hexdigest()}"', "X_Repo_Commit": COMMIT}
        length = len(file.data) if said is None else said
        self.answer(200, length, **({} if file.foreign else headers))
        if self.command == "GET":
            self.wfile.write(file.data)
            self.close_connection = True  # all has been sent, whatever was said
