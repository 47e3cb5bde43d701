"""What the commands share at their edges: exit codes, the one line of what cannot be done here, a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

DISAGREES, UNUSABLE, INTERRUPTED = 1, 2, 130


class Unusable(Exception):
    """What was asked for cannot be done here; the message is the one line that says why."""


class Parser(argparse.ArgumentParser):
    """Says in one line what it cannot take."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(UNUSABLE)


def require_isa() -> None:
    """Unusable where $MATMUL_GRAD_ISA asks for what this CPU has not."""
    from .kernels.cpu import host

    try:
        host.cpu()
    except (ValueError, RuntimeError) as reason:
        raise Unusable(str(reason)) from reason


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
