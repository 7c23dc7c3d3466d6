"""What a line must have in it for a pattern to match: never more than the pattern asks for."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgpu_llm.core import diagnosis
from mgpu_llm.core.anchors import anchor
from mgpu_llm.core.engine_log import parse
from mgpu_llm.core.signatures import Where
from tests.support import excerpts


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("CUDA out of memory", "CUDA out of memory"),
        (r"^Killed$", "Killed"),
        (r"\[Errno 98\]", "[Errno 98]"),
        (r"\bGPU is lost\b", "GPU is lost"),
        (r"custom_all_reduce\.cuh:\d+ '(?P<what>[^']+)'", "custom_all_reduce.cuh:"),
        (r"(?P<what>Weight files .*)", "Weight files "),
        (r"error: (?P<what>one|another)", "error: "),
        (r"colou?r of the sky", "r of the sky"),
        (r"at (?:least )?twenty", "twenty"),
        (r"abc{2,3}def", "def"),
        (r"abc{2}", "ab"),
        (r"lon+g", "lon"),
        (r"one(?=two)(?!three)(?<=x)", "one"),
        (r"one(?:two)threefour", "threefour"),
        (r"[abc]d[^]]e[]x]fg", "fg"),
        ("one|another", ""),
        (".*", ""),
        ("", ""),
    ],
)
def test_the_longest_text_that_is_in_every_match(pattern: str, text: str) -> None:
    assert anchor(pattern) == text


@given(st.from_regex(r"[ab]{0,3}(\([ab]{0,3}(\|[ab]{1,2})?\)[?*+]?)?[ab]{0,3}[?*+]?", fullmatch=True), st.data())
def test_whatever_a_pattern_matches_has_its_text(pattern: str, data: st.DataObject) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error:
        return
    assert anchor(pattern) in data.draw(st.from_regex(compiled, fullmatch=True))


def test_every_pattern_of_the_table_has_a_text_that_spares_most_lines_the_search() -> None:
    for row in (row for row in diagnosis.TABLE if row.where is not Where.EXIT):
        for pattern, text in zip(row.patterns, row.anchors, strict=True):
            assert len(text) >= 4, f"{row.id}: {pattern.pattern}"


def test_no_text_keeps_a_pattern_from_a_line_that_it_matches() -> None:
    said = [*excerpts.quoted(), *excerpts.recorded().values()]
    for message in {parse(line).message for excerpt in said for line in excerpt.lines}:
        for row in diagnosis.TABLE:
            for pattern, text in zip(row.patterns, row.anchors, strict=True):
                if pattern.search(message):
                    assert text in message
