from __future__ import annotations

import pytest

from mgpu_llm.ctl.words import Page, about, cells, columns, limit, percent, plain, rate, size, span


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


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3.0, "0 s"), (6.6, "7 s"), (44.0, "45 s"), (84.0, "85 s"), (133.0, "2 min"), (9_000.0, "2 h 30 min")],
)
def test_a_guess_is_rounded_as_coarsely_as_it_is_guessed(seconds: float, words: str) -> None:
    assert about(seconds) == f"about {words}"


def test_a_limit_that_was_set_has_no_decimals_that_nobody_set() -> None:
    assert [limit(seconds) for seconds in (8.0, 2.5, 35.0, 120.0)] == ["8 s", "2.5 s", "35 s", "2 min"]


def test_rates_are_in_millions_of_bytes() -> None:
    assert [rate(value) for value in (0.0, 4.24e6, 120.4e6, 7.2e9)] == ["0.0 MB/s", "4.2 MB/s", "120 MB/s", "7200 MB/s"]


def test_a_hundred_percent_is_all_of_it() -> None:
    assert [percent(value) for value in (-1.0, 38.4, 99.7, 100.0, 101.0)] == ["0 %", "38 %", "99 %", "100 %", "100 %"]


def test_a_text_too_long_for_its_room_loses_its_end_or_its_middle_and_never_half_a_character() -> None:
    page, bare = Page(colour=False, width=None), Page(colour=False, width=None, encoding="ascii")
    assert page.cut("distributed", 8) == "distrib…"
    assert page.squeeze("/srv/models/Qwen2.5-72B", 15) == "/srv/…en2.5-72B"
    assert bare.cut("distributed", 8) == "distr..."
    for room in range(3, 40):
        for text in (
            "/models/模型模型模型模型-72B",
            "e\u0301" * 30,
            "plain ascii and much more than there is room for",
        ):
            for one in (page, bare):
                assert cells(one.cut(text, room)) <= room
                assert cells(one.squeeze(text, room)) <= room
                assert one is page or one.squeeze(text, room).isascii()


def test_sizes_are_in_gib() -> None:
    assert size(2_340_000_000) == "2.2 GiB"


def test_plain_keeps_every_letter_and_shows_every_control() -> None:
    assert plain("Größe 模型 █") == "Größe 模型 █"
    assert plain("a\tb\x1b[31m\r\n\x7f") == "a    b\\x1b[31m\\r\\n\\x7f"


def test_columns_are_as_wide_as_their_widest_cell_and_have_no_tail() -> None:
    assert columns([("a", "bbb", ""), ("cc", "d", "e")]) == ["a   bbb", "cc  d    e"]
    assert columns([]) == []


def test_a_page_without_a_width_never_wraps() -> None:
    page = Page(colour=False, width=None, encoding="utf-8")
    assert page.wrap("word " * 100, 0) == ["word " * 100]
    assert page.wrap("", 0) == []
