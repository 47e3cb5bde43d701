"""How the commands end: exit codes, and the one line of what cannot be done here."""

from __future__ import annotations

import importlib.util

DISAGREES, UNUSABLE, INTERRUPTED = 1, 2, 130


class Unusable(Exception):
    """What was asked for cannot be done here; the message is the one line that says why."""


def require(module: str, package: str, extra: str = "check") -> None:
    """Unusable where ``module`` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Unusable(f"{package} is missing: pip install 'matmul-grad[{extra}]'")
