"""Values of options, as the parsers of the bench's commands read them: an error for each that is not one."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

from . import devices


def some_of(known: Sequence[str]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        wanted = text.split(",")
        if set(wanted) <= set(known):
            return tuple(name for name in known if name in wanted)
        raise argparse.ArgumentTypeError(f"some of {','.join(known)}, got {text}")

    return parse


def threads(text: str) -> tuple[int, ...]:
    most = len(devices.cores())
    with contextlib.suppress(ValueError):
        counts = tuple(sorted({int(part) for part in text.split(",")}))
        if counts[0] >= 1 and counts[-1] <= most:
            return counts
    raise argparse.ArgumentTypeError(f"numbers from 1 to {most}, the cores of this process, got {text}")


def positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"a number above 0, got {text}")
