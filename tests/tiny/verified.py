"""The table of docs/models.md: which checks each model passed in which version of ComfyUI.

``python tests/tiny/verified.py record`` runs the checks with the ComfyUI under test and writes what
passed into ``tests/verified/``; ``... write`` puts all records into the table. A test compares.
"""

import json
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECORDS = REPOSITORY / "tests" / "verified"
TABLE = REPOSITORY / "docs" / "models.md"
TESTS = REPOSITORY / "tests" / "comfy" / "test_models.py"

#: What a passed test of ``tests/comfy/test_models.py`` stands for in the table.
CHECKS = {
    "test_only_video_tiles_are_skipped": "S",
    "test_with_nothing_to_skip_the_result_is_the_dense_one": "D",
    "test_the_sampler_calls_it_with_the_same_names": "C",
}
NOTHING = "-"


class Recorder:
    """A plugin of pytest: the checks that passed, by model."""

    def __init__(self):
        self.passed = {}

    def pytest_runtest_logreport(self, report):
        found = re.search(r"::(\w+)\[(.*)\]$", report.nodeid)
        if report.when == "call" and report.passed and found and found[1] in CHECKS:
            self.passed.setdefault(found[2], []).append(CHECKS[found[1]])


def record(version):
    """Run the checks and write down what passed; fails if one does not."""
    import pytest

    recorder = Recorder()
    if pytest.main([str(TESTS), "-k", " or ".join(CHECKS)], plugins=[recorder]):
        sys.exit("not recorded: tests failed")
    passed = {name: "".join(sorted(checks)) for name, checks in sorted(recorder.passed.items())}
    (RECORDS / f"comfyui-{version}.json").write_text(json.dumps(passed, indent=2) + "\n")


def records():
    """``{version: {model: checks}}``, as the columns of the table."""
    found = {path.stem.split("-")[1]: json.loads(path.read_text()) for path in _files()}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split(".")]))


def cells(model):
    """The cells of a model, one for each version."""
    return [passed.get(model, NOTHING) for passed in records().values()]


def rows(text):
    """``{model: (cells, line)}`` of the table's rows in the text."""
    models = {model for passed in records().values() for model in passed}
    found = {}
    for line in text.splitlines():
        model, *rest = [cell.strip() for cell in line.strip("|").split("|")]
        if model in models:
            found[model] = rest, line
    return found


def write():
    text = TABLE.read_text()
    for model, ((sees, *_), line) in rows(text).items():
        text = text.replace(line, "| " + " | ".join([model, sees, *cells(model)]) + " |")
    TABLE.write_text(text)


def _files():
    return RECORDS.glob("comfyui-*.json")


if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]
    if sys.argv[1:] == ["record"]:
        import tiny_comfy

        record(str(tiny_comfy.version()))
    elif sys.argv[1:] == ["write"]:
        write()
    else:
        sys.exit(__doc__)
