"""Which checks each model passed in which version: the tables of README.md, docs/models.md and
docs/diffusers.md.

``python tests/tiny/verified.py record comfyui`` (or ``diffusers``) runs the checks with the version
under test and writes what passed into ``tests/verified/``; ``... write`` puts all records into the
tables, each between its two marks. A test compares.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import parse

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS = REPOSITORY / "tests" / "verified"
README = REPOSITORY / "README.md"

BEGIN = "<!-- written by tests/tiny/verified.py -->\n\n"
END = "\n\n<!-- end of what is written -->"
NOTHING = "-"

#: The families of README.md, by how the names of their models begin; the longest beginning counts.
FAMILIES = {
    "MiniMax H3": "MiniMax H3",
    "Wan": "Wan 2.1, 2.2",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanVideo 1.5": "HunyuanVideo 1.5",
    "LTX-Video": "LTX-Video",
    "LTX-2": "LTX-2, 2.3, 2.5",
    "CogVideoX": "CogVideoX",
    "Mochi": "Mochi",
    "Cosmos": "Cosmos",
    "Kandinsky": "Kandinsky 5",
    "SkyReels": "SkyReels V2",
    "Allegro": "Allegro",
    "ChronoEdit": "ChronoEdit",
    "ConsisID": "ConsisID",
    "EasyAnimate": "EasyAnimate",
    "FramePack": "FramePack",
    "Helios": "Helios",
    "Motif": "Motif-Video",
    "HunyuanImage": "HunyuanImage 2.1",
    "Flux": "Flux",
    "Qwen": "Qwen-Image",
}


def comfyui_version():
    import tiny_comfy

    return str(tiny_comfy.version())


def diffusers_version():
    import diffusers

    return diffusers.__version__


@dataclass(frozen=True)
class Host:
    """What runs the models. ``checks``: what a passed test of ``tests`` stands for in the table of
    ``document``, whose first columns ``by_hand`` no test can write."""

    name: str
    version: Callable[[], str]
    tests: str
    checks: dict[str, str]
    document: Path
    by_hand: tuple[str, ...]

    def record(self):
        """Run the checks and write down what passed; fails if one does not."""
        import pytest

        recorder = Recorder(self.checks)
        tests = str(REPOSITORY / "tests" / self.tests)
        if pytest.main([tests, "-k", " or ".join(self.checks)], plugins=[recorder]):
            sys.exit("not recorded: tests failed")
        passed = {model: "".join(sorted(found)) for model, found in sorted(recorder.passed.items())}
        path = RECORDS / f"{self.name.lower()}-{self.version()}.json"
        path.write_text(json.dumps(passed, indent=2) + "\n")

    def records(self):
        """``{version: {model: letters}}``, the oldest version first."""
        paths = RECORDS.glob(f"{self.name.lower()}-*.json")
        found = {path.stem.split("-")[1]: json.loads(path.read_text()) for path in paths}
        return {version: found[version] for version in sorted(found, key=parse)}

    def newest(self):
        """``(version, {model: letters})``"""
        return list(self.records().items())[-1]

    def table(self):
        """The rows of the document's table: what is written by hand, and what every version has."""
        records = self.records()
        yield *self.by_hand, *records
        for row in rows(self.document):
            letters = (passed.get(row[0], NOTHING) for passed in records.values())
            yield *row[: len(self.by_hand)], *letters


class Recorder:
    """A plugin of pytest: the letters of the checks that passed, by model."""

    def __init__(self, checks):
        self.checks = checks
        self.passed = {}

    def pytest_runtest_logreport(self, report):
        found = re.search(r"::(\w+)\[(.*)\]$", report.nodeid)
        if report.when == "call" and report.passed and found and found[1] in self.checks:
            self.passed.setdefault(found[2], []).append(self.checks[found[1]])


#: Tests of the same name ask the same of both hosts.
OF_BOTH = {
    "test_only_video_tiles_are_skipped": "S",
    "test_with_nothing_to_skip_the_result_is_the_dense_one": "D",
}
COMFYUI = Host(
    name="ComfyUI",
    version=comfyui_version,
    tests="comfy/test_models.py",
    checks=OF_BOTH | {"test_the_sampler_calls_it_with_the_same_names": "C"},
    document=REPOSITORY / "docs" / "models.md",
    by_hand=("model", "video attention sees"),
)
DIFFUSERS = Host(
    name="diffusers",
    version=diffusers_version,
    tests="test_diffusers_models.py",
    checks=OF_BOTH
    | {
        "test_its_own_pipeline_samples_it_with_cfg": "C",
        "test_a_second_run_gives_the_same_bits": "R",
        "test_disable_brings_the_plain_result_back": "U",
    },
    document=REPOSITORY / "docs" / "diffusers.md",
    by_hand=("model", "class of the transformer", "beside the video in its self-attention"),
)
HOSTS = (COMFYUI, DIFFUSERS)


def summary():
    """The rows of README.md: what all models of a family passed in the newest version of a host."""
    columns = [(host.name, *host.newest()) for host in HOSTS]
    yield "model", *(f"{name} {version}" for name, version, _ in columns)
    for family, label in FAMILIES.items():
        yield label, *(common(family, passed) for _, _, passed in columns)


def common(family, passed):
    """The letters that all models of a family have in common."""
    letters = [set(found) for model, found in passed.items() if family_of(model) == family]
    return "".join(sorted(set.intersection(*letters))) if letters else NOTHING


def family_of(model):
    """A model of no family is an error: README.md would lack it."""
    return max(filter(model.startswith, FAMILIES), key=len)


#: What makes the rows of each document's table, its head first.
TABLES = {host.document: host.table for host in HOSTS} | {README: summary}


def rows(document):
    """The cells of a document's table, without its head."""
    _, lines, _ = parts(document)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def parts(document):
    """What is before the table, the lines of the table, and what is after it."""
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    table, after = rest.split(END)
    return before + BEGIN, table.splitlines(), END + after


def written(document):
    """The text of a document with its table as it should be."""
    before, _, after = parts(document)
    head, *others = ("| " + " | ".join(cells) + " |" for cells in TABLES[document]())
    rule = "|---" * (head.count("|") - 1) + "|"
    return before + "\n".join([head, rule, *others]) + after


def main(arguments):
    hosts = {("record", host.name.lower()): host for host in HOSTS}
    if arguments == ("write",):
        for document in TABLES:
            document.write_text(written(document), encoding="utf-8")
    elif arguments in hosts:
        hosts[arguments].record()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main(tuple(sys.argv[1:]))
