"""How `matmul-grad` talks: headings, tables, progress, curves. Bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")
BARS = "▁▂▃▄▅▆▇█"


def make_console(width: int = 100) -> Console:
    """Plain text, so that brackets stay; wide enough for every table where no terminal sets a width."""
    console = Console(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, emoji=False, width=width)


def heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold cyan")


def table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A ruled table; the first ``left`` columns are words, the others figures."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        # Nothing is cut off: where a terminal is too narrow for it, a cell goes on in the next line.
        shown.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def track(console: Console, doing: str, items: Sequence[T]) -> Iterator[T]:
    """The items, while what is done with them shows."""
    if not console.is_terminal:
        console.print(f"{doing}: {len(items)} …")
        yield from items
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, description=doing)


@contextlib.contextmanager
def progress(console: Console, doing: str, count: int, seconds: float) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left, of what takes about ``seconds``; drawn when it is told what runs, and how many seconds'
    worth is done. While something is timed it would take time from it."""
    if not console.is_terminal:
        console.print(f"{doing}: {count} comparisons, about {seconds / 60:.1f} minutes …")
        yield lambda *_: None
        return
    share = TextColumn("{task.percentage:.0f} %")
    columns = TextColumn("{task.description}"), BarColumn(), share, TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(doing, total=seconds)
        yield lambda what, done: bar.update(task, description=what, advance=done, refresh=True)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """The curve in one line, each character the mean of its part, between the curve's own ends; NaN is "!".

    >>> sparkline([3.0, 2.0, 1.0, 0.0], width=4)
    '█▆▃▁'
    """
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[i:j]) / (j - i) for i, j in itertools.pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)] or [0.0]
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low or 1.0)
    return "".join(BARS[round((mean - low) * scale)] if math.isfinite(mean) else "!" for mean in means)
