"""Markdown: tables, and parts of a page that are written by a command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["between", "markers", "table"]


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


def markers(name: str) -> tuple[str, str]:
    """What stands before and behind the part of a page that is called ``name``.

    >>> markers("steps")
    ('<!-- steps:begin -->', '<!-- steps:end -->')
    """
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between the markers of ``name``; ValueError where they are not there once each.

    >>> between("a\\n<!-- x:begin -->\\nold\\n<!-- x:end -->\\nb", "x", "new")
    'a\\n<!-- x:begin -->\\nnew\\n<!-- x:end -->\\nb'
    """
    begin, end = markers(name)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must hold {begin} and {end} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
