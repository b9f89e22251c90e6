"""The page of the environments is that of their docstrings."""

from __future__ import annotations

from hiedit_benchmarks.make_docs import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m hiedit_benchmarks.make_docs"


def test_nothing_of_the_markup_is_left() -> None:
    text = page()
    for rest in (":class:", ":meth:", ":func:", "``hiedit", "Args:"):
        assert rest not in text, rest
    assert text.count("```") % 2 == 0
