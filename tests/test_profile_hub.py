"""Profiles of the hub: the real huggingface_hub, and a hub on this machine as its mirror.

The client runs in processes of its own, because it reads its settings when it is imported. Each
loads many profiles at the same time.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_hub import COMMIT, File, TinyHub

from comfyui_liteattention.learning import PHASES
from comfyui_liteattention.profile import Fingerprint, Profile
from comfyui_liteattention.profile_file import MAX_BYTES, PATIENCE, save

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parents[1]

# Prints the name of each profile, or what is wrong with it. Any other error ends the process.
CLIENT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from comfyui_liteattention import profile_file

profile_file.PATIENCE = float(sys.argv[1])

def told(source):
    try:
        profile_file.load(source)
        return profile_file.load(source).name  # from the cache
    except ValueError as error:
        return str(error)

with ThreadPoolExecutor(64) as pool:
    print(json.dumps(list(pool.map(told, sys.argv[2:]))))
"""


class Trap:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return sys.exit, ("the pickle was loaded",)


LARGE = bytes(MAX_BYTES + 1)
SMALL = bytes(1000)  # only its size matters
REFUSED = {
    "large": (File(LARGE), "larger than 1 MiB"),
    "large-stored": (File(LARGE, stored=True), "larger than 1 MiB"),
    "larger-than-said": (File(LARGE, size_said=500), "can't be fetched"),
    "larger-than-said-stored": (File(LARGE, size_said=500, stored=True), "can't be fetched"),
    "larger-than-sent": (File(LARGE, size_said=500, size_sent=500), "is damaged"),
    "smaller-than-said": (File(SMALL, size_said=5000), "can't be fetched"),
    "damaged": (File(SMALL), "is damaged, or not a safetensors file"),
    "empty": (File(b""), "is damaged, or not a safetensors file"),
    "pickle": (File(pickle.dumps(Trap())), "is damaged, or not a safetensors file"),
    "gated": (File(SMALL, status=401, error="GatedRepo"), "gated .* log in with `hf auth login`"),
    "not-allowed": (File(SMALL, status=403, error="GatedRepo"), "ask for access"),
    "private": (File(SMALL, status=401), "private or gated, log in with `hf auth login`"),
    "broken": (File(SMALL, status=500), "500 .* try again, or give a file on disk"),
    "busy": (File(SMALL, status=429), "429 .* try again, or give a file on disk"),
    "foreign": (File(SMALL, foreign=True), "can't be fetched"),
}
# Only in part, or never; the client takes its time to give up.
LATE = {
    "smaller-than-sent": File(SMALL, size_said=5000, size_sent=5000),
    "silent": File(SMALL, silent="HEAD"),
    "silent-later": File(SMALL, silent="GET"),
}
ABSENT = {
    f"me/good@{COMMIT}:other.safetensors": "Entry Not Found",
    f"me/good@{COMMIT[::-1]}": "Revision Not Found",
    f"me/other@{COMMIT}": "Repository Not Found",
}


def at(*repositories: str) -> list[str]:
    return [f"me/{repository}@{COMMIT}" for repository in repositories]


GOOD = at("good", "good-stored")


class Told(NamedTuple):
    """By source, what came of loading it."""

    online: dict[str, str]
    late: dict[str, str]  # with little patience
    alone: dict[str, str]  # the hub is there no more
    offline: dict[str, str]
    asked: dict[str, list[str]]  # of each repository


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Told:
    home = tmp_path_factory.mktemp("hub")
    good = example(home / "good.safetensors")
    files = {"good": File(good), "good-stored": File(good, stored=True), **LATE}
    files |= {name: file for name, (file, _) in REFUSED.items()}
    with TinyHub({f"me/{name}": file for name, file in files.items()}) as hub:
        environment = mirrored(hub, home)
        online = Client([*GOOD, *at(*REFUSED), *ABSENT], environment)
        late = Client(at(*LATE), environment, patience=1)
        answers = online.told(), late.told()
    some = [*GOOD, *at("new")]
    alone, offline = Client(some, environment), Client(some, environment | {"HF_HUB_OFFLINE": "1"})
    return Told(*answers, alone.told(), offline.told(), hub.asked)


def example(path: Path) -> bytes:
    model = Fingerprint(1, 12, 128, 64, 64)
    ratios = ((0.25,) * PHASES,)
    save(Profile(("a",), ratios, model, 0.01, 1.0, 4096, 20, "cpu", 0.5, 0.008), path)
    return path.read_bytes()


def mirrored(hub: TinyHub, home: Path) -> dict[str, str]:
    """The environment of a user of a mirror, with an empty cache and without a proxy."""
    others = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    return others | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}


class Client:
    """A process that loads profiles."""

    def __init__(self, sources: list[str], environment: dict[str, str], patience=PATIENCE):
        self.sources = sources
        command = [sys.executable, "-c", CLIENT, str(patience), *sources]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def told(self) -> dict[str, str]:
        try:
            out, err = self.process.communicate(timeout=PATIENCE + 60)
        finally:
            self.process.kill()
        assert self.process.returncode == 0, err.decode()
        return dict(zip(self.sources, json.loads(out), strict=True))


def is_one_sentence(text: str) -> bool:
    whole = text.startswith("LiteAttention: the profile ") and text.endswith(".")
    return whole and "\n" not in text and len(text) < 600


def test_a_profile_is_fetched_once(told):
    assert [told.online[source] for source in GOOD] == GOOD
    for repository in ("me/good", "me/good-stored"):
        assert told.asked[repository].count("GET") == 1
        assert told.asked[repository].count("HEAD") <= 2


def test_what_was_fetched_once_needs_no_hub(told):
    assert [told.alone[source] for source in GOOD] == GOOD
    assert [told.offline[source] for source in GOOD] == GOOD


def test_what_was_never_fetched_needs_one(told):
    (new,) = at("new")
    assert "can't be fetched" in told.alone[new]
    assert told.alone[new].endswith("; try again, or give a file on disk.")
    assert "HF_HUB_OFFLINE" in told.offline[new]
    assert is_one_sentence(told.alone[new]) and is_one_sentence(told.offline[new])


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_can_not_give_is_one_sentence(told, name):
    (source,) = at(name)
    assert is_one_sentence(told.online[source])
    assert re.search(REFUSED[name][1], told.online[source])


@pytest.mark.parametrize("source", ABSENT)
def test_what_is_not_there_is_named(told, source):
    assert is_one_sentence(told.online[source])
    assert ABSENT[source] in told.online[source]
    assert "; check the names of the repository, the commit and the file." in told.online[source]


@pytest.mark.parametrize("name", ["large", "large-stored"])
def test_a_large_file_is_never_downloaded(told, name):
    assert told.asked[f"me/{name}"] == ["HEAD"]


@pytest.mark.parametrize("name", LATE)
def test_a_hub_that_does_not_answer_is_left_in_time(told, name):
    (source,) = at(name)
    assert is_one_sentence(told.late[source])
    assert "can't be fetched" in told.late[source]
    if LATE[name].silent:
        assert "it took longer than 1 s" in told.late[source]
