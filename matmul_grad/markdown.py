"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table; the first ``left`` columns are left-aligned, the others right-aligned.

    >>> print(table(["n", "µs"], [["8", "1.5"]]))
    | n | µs |
    |---|--:|
    | 8 | 1.5 |
    """
    ruler = ["---" if i < left else "--:" for i in range(len(columns))]
    cells = [columns, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'|'.join(ruler)}|", *lines[1:]])
