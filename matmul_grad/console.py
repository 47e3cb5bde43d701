"""What the commands print: headings, tables, progress, curves. Bars on a terminal, plain lines elsewhere and without
rich."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from . import markdown

T = TypeVar("T")
BARS = "▁▂▃▄▅▆▇█"


class Console(Protocol):
    """The part of rich's Console that the commands use."""

    @property
    def is_terminal(self) -> bool: ...

    def print(
        self, *objects: Any, sep: str = " ", style: str | None = None, soft_wrap: bool | None = None
    ) -> object: ...


class PlainConsole:
    """Lines without style, where rich is not installed."""

    is_terminal = False

    def print(self, *objects: Any, sep: str = " ", style: str | None = None, soft_wrap: bool | None = None) -> None:
        print(*objects, sep=sep)


def make_console(width: int = 100) -> Console:
    """Plain text, so that brackets stay; wide enough for every table where no terminal sets a width."""
    if importlib.util.find_spec("rich") is None:
        return PlainConsole()
    from rich.console import Console as RichConsole

    class LineConsole(RichConsole):
        def on_broken_pipe(self) -> None:
            raise  # to `cli_common.run_command`; rich would end the process with 1

    console = LineConsole(markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else LineConsole(markup=False, highlight=False, emoji=False, width=width)


def heading(console: Console, text: str) -> None:
    console.print(f"\n{text}", style="bold cyan")


def table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A ruled table; the first ``left`` columns are left-aligned, the others right-aligned."""
    if isinstance(console, PlainConsole):
        console.print(markdown.table(columns, rows, left))
        return
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        # Nothing is cut off: where a terminal is too narrow for it, a cell goes on in the next line.
        shown.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def track(console: Console, doing: str, items: Iterable[T], count: int) -> Iterator[T]:
    """Iterate over ``count`` items with a progress bar."""
    if not console.is_terminal:
        console.print(f"{doing}: {count} …")
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

    with bar(
        console, TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    ) as shown:
        yield from shown.track(items, total=count, description=doing)


@contextlib.contextmanager
def progress(console: Console, doing: str, count: int, seconds: float) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left, for about ``seconds``.

    It is drawn only when the yielded function is called, with what runs and the seconds of work done, so that drawing
    takes no time from what is timed."""
    if not console.is_terminal:
        console.print(f"{doing}: {count} comparisons, about {seconds / 60:.1f} minutes …")
        yield lambda *_: None
        return
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with bar(console, *columns, auto_refresh=False) as shown:
        task = shown.add_task(doing, total=seconds)
        yield lambda what, done: shown.update(task, description=what, advance=done, refresh=True)


def bar(console: Console, *columns: Any, auto_refresh: bool = True) -> Any:
    """rich's progress bar on a console of rich, gone when it ends."""
    from rich.progress import Progress

    shown: Any = console
    return Progress(*columns, console=shown, transient=True, auto_refresh=auto_refresh)


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
