"""What is said of each key, from the comments of the shipped file."""

from __future__ import annotations

from mgpu_llm.config.descriptions import descriptions


def test_a_comment_is_about_all_keys_up_to_the_next_comment_or_empty_line() -> None:
    found = descriptions("[a]\n# Both.\nb = 1\nc = 2\n# One.\nd = 3\n\ne = 4\n")
    assert found == {"a": "", "a.b": "Both.", "a.c": "Both.", "a.d": "One."}


def test_a_comment_behind_a_key_is_about_that_key_alone() -> None:
    found = descriptions('[a]\n# Both.\nb = "# no comment"  # Only b.\nc = 2\n')
    assert (found["a.b"], found["a.c"]) == ("Only b.", "Both.")


def test_a_comment_above_a_tables_name_is_about_the_table_and_the_first_one_about_the_file() -> None:
    assert descriptions("# All.\n\n# A.\n[a]\n# B.\n[a.b]\n") == {"": "All.", "a": "A.", "a.b": "B."}


def test_what_is_commented_out_is_described_where_it_is_first_told() -> None:
    found = descriptions("[a]\n# Rungs.\n#\n# [[a.b]]\n# c = 1  # First.\n# [[a.b]]\n# c = 2  # Second.\n")
    assert found == {"a": "", "a.b": "Rungs.", "a.b.c": "First."}


def test_lines_are_joined_paragraphs_kept_and_lists_have_a_line_for_each_entry() -> None:
    text = "[a]\n# It is\n# long:\n#   x, w  one\n#   y-z   two\n# End.\n#\n# More\n# of it.\nb = 1\n"
    assert descriptions(text)["a.b"] == "It is long:\nx, w: one\ny-z: two\nEnd.\n\nMore of it."
