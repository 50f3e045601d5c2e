"""Plain text tables, the same on a terminal, in a pipe and in a file."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, text_columns: int = 1) -> str:
    """Returns the rows under their headers, columns aligned.

    Args:
        headers: one word or two per column.
        rows: as many cells per row as headers; a float is shown with two decimals, None as "-".
        text_columns: how many columns, from the first on, are aligned to the left; the others are to the right.
    """
    lines = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(map(_aligned, line, widths, [column < text_columns for column in range(len(widths))])).rstrip() for line in lines
    )


def _aligned(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
