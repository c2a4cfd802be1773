"""docs/measured.md holds what benchmarks/results say, and nothing that was typed."""

from __future__ import annotations

from benchmarks.tables import PAGE, TABLES, filled


def test_the_page_is_what_the_script_writes():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page) == page


def test_every_table_of_the_page_has_a_maker():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table ") == page.count("<!-- end -->") == len(TABLES)
