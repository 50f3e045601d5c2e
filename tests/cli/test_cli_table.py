"""Text tables."""

from __future__ import annotations

from dynprune.cli.table import format_table


def test_columns_are_aligned_and_values_rounded():
    table = format_table(["name", "ms", "note"], [["eager", 12.3456, "ok"], ["onnxruntime", None, "-1"]])
    assert table.splitlines() == [
        "name            ms  note",
        "-----------  -----  ----",
        "eager        12.35    ok",
        "onnxruntime      -    -1",
    ]


def test_text_columns_are_left_aligned_without_trailing_spaces():
    table = format_table(["a", "b"], [["xx", "y"], ["x", "yyy"]], text_columns=2)
    assert table.splitlines() == ["a   b", "--  ---", "xx  y", "x   yyy"]


def test_a_table_without_rows_is_its_header():
    assert format_table(["a", "bb"], []).splitlines() == ["a  bb", "-  --"]
