"""What the bench's commands share: the values of options, with an error for each that is not one, and interruption."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .. import machine
from ..cli_common import terminal


def listed(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def some_of(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        wanted = text.split(",")
        if set(wanted) <= set(known):
            return tuple(name for name in known if name in wanted)
        raise argparse.ArgumentTypeError(f"some of {','.join(known)}, got {text}")

    return parse


def threads(text: str) -> tuple[int, ...]:
    most = machine.usable_cores()
    with contextlib.suppress(ValueError):
        counts = tuple(sorted({int(part) for part in text.split(",")}))
        if counts[0] >= 1 and counts[-1] <= most:
            return counts
    raise argparse.ArgumentTypeError(f"numbers from 1 to {most}, the cores of this process, got {text}")


def positive(text: str, most: float = sys.float_info.max) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= most:
            return float(text)
    raise argparse.ArgumentTypeError(f"a number above 0, got {text}")


def minutes(text: str) -> float:
    return positive(text, most=24 * 60)


class Interrupted:
    """True once the block was interrupted."""

    happened = False

    def __bool__(self) -> bool:
        return self.happened


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[Interrupted]:
    """Ctrl-C and SIGTERM end the block, and no more than that: children ended, what follows is done."""
    interrupted = Interrupted()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield interrupted
    except KeyboardInterrupt:
        interrupted.happened = True
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def running(doing: str) -> Iterator[Callable[[str], None]]:
    """What is running, on stderr: a line that changes on a terminal, nothing elsewhere or where rich is missing."""
    console = terminal()
    if console is None:
        yield lambda news: None
        return
    with console.status(doing) as status:
        yield status.update
