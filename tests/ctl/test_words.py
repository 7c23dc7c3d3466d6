from __future__ import annotations

import pytest

from mgpu_llm.ctl.words import Page, columns, plain, size, span


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1.0, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (10.0, "10 s"),
        (59.6, "1 min"),
        (125.0, "2 min 5 s"),
        (3600.0, "1 h"),
        (11_520.0, "3 h 12 min"),
        (86_399.9, "1 d"),
        (352_800.0, "4 d 2 h"),
    ],
)
def test_a_span_is_worded_in_its_two_largest_units(seconds: float, words: str) -> None:
    assert span(seconds) == words


def test_sizes_are_in_gib() -> None:
    assert size(2_340_000_000) == "2.2 GiB"


def test_plain_keeps_every_letter_and_shows_every_control() -> None:
    assert plain("Größe 模型 █") == "Größe 模型 █"
    assert plain("a\tb\x1b[31m\r\n\x7f") == "a    b\\x1b[31m\\r\\n\\x7f"


def test_columns_are_as_wide_as_their_widest_cell_and_have_no_tail() -> None:
    assert columns([("a", "bbb", ""), ("cc", "d", "e")]) == ["a   bbb", "cc  d    e"]
    assert columns([]) == []


def test_a_page_without_a_width_never_wraps() -> None:
    page = Page(colour=False, width=None, bullet="*")
    assert page.wrap("word " * 100, 0) == ["word " * 100]
    assert page.wrap("", 0) == []
