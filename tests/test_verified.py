"""The tables of what was verified hold what was recorded, and every model that has tests."""

import pytest
import tiny_comfy
import tiny_families
from packaging.version import parse
from verified import COMFYUI, DIFFUSERS, HOSTS, TABLES, rows, written

from comfyui_liteattention.integrations.diffusers.families import FAMILIES

each_host = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)


def known(host, version=None):
    """The models that have tests: in one version, or in any."""
    if host is DIFFUSERS:
        since = tiny_families.SINCE
        return {
            name
            for name in tiny_families.MODELS
            if version is None or parse(since.get(name, "0")) <= parse(version)
        }
    cases = tiny_comfy.CASES
    return {c.name for c in cases if version is None or parse(c.since) <= parse(version)}


SAMPLED = {COMFYUI.name: tiny_comfy.SAMPLED, DIFFUSERS.name: tiny_families.SAMPLED}


@each_host
def test_the_records_are_those_of_the_tests(host):
    """Nothing is recorded but what there is, and all of it passed."""
    everything = "".join(sorted(host.checks.values()))
    unsampled = everything.replace("C", "")
    for version, passed in host.records().items():
        assert passed == {
            name: everything if name in SAMPLED[host.name] else unsampled
            for name in known(host, version)
        }, f"run `python tests/tiny/verified.py record` with {host.name} {version}"


@each_host
def test_every_model_has_a_row(host):
    names = [name for name, *_ in rows(host.document)]
    assert len(names) == len(set(names)) and set(names) == known(host)


def test_every_family_of_diffusers_is_tested():
    assert {cells[1].strip("`") for cells in rows(DIFFUSERS.document)} == set(FAMILIES)


@pytest.mark.parametrize("document", TABLES, ids=lambda document: document.name)
def test_the_tables_are_those_of_the_records(document):
    found = document.read_text(encoding="utf-8")
    assert found == written(document), "run `python tests/tiny/verified.py write`"
