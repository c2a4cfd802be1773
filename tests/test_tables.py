"""The tables of the docs hold what benchmarks/results say, and nothing that was typed."""

from __future__ import annotations

import pytest

from benchmarks.tables import PAGES, filled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_what_the_script_writes(page):
    assert filled(page) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_of_the_page_has_a_maker(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table ") == text.count("<!-- end -->") == len(PAGES[page])
