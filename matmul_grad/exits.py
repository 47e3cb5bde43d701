"""What the commands share at their edges: exit codes, the one line of what cannot be done here, a terminal."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

DISAGREES, UNUSABLE, INTERRUPTED = 1, 2, 130


class Unusable(Exception):
    """What was asked for cannot be done here; the message is the one line that says why."""


def require(module: str, package: str, extra: str = "check") -> None:
    """Unusable where ``module`` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Unusable(f"{package} is missing: pip install 'matmul-grad[{extra}]'")


def terminal() -> Console | None:
    """stderr, where it is a terminal and rich is installed: a machine with a GPU may have torch and little else."""
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else None
