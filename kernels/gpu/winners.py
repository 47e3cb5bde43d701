"""Measured winners: the project's table, and the user's, which `matmul-grad tune` writes and which goes before it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

from .config import Problem, Target, TileConfig

VERSION = 1
OWN = Path(__file__).with_name("winners.json")


def user_path() -> Path:
    """Where the user's table lies: $MATMUL_GRAD_TUNED, or tuned.json in the user's configuration folder."""
    named = os.environ.get("MATMUL_GRAD_TUNED")
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(named or Path(folder, "matmul_grad", "tuned.json")).expanduser()


def key(problem: Problem, target: Target) -> str:
    """The name of a problem on a GPU in a table.

    >>> key(Problem(1, 2, 3, "bfloat16", "N", "T", tma=True), Target(90, 132, 232448))
    'sm90x132 1 2 3 bfloat16 N T ieee aligned tma 1'
    """
    *sizes, aligned, tma, batch, invariant, result = astuple(problem)
    flags = "aligned" if aligned else "narrow", "tma" if tma else "pointers", batch, *["invariant"] * invariant
    flags += (result,) if result else ()
    return " ".join(map(str, (f"sm{target.arch}x{target.sms}", *sizes, *flags)))


def load(path: Path) -> dict[str, TileConfig]:
    """The winners of a table. Raises OSError where there is none, ValueError where it is not one."""
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
        if table["version"] != VERSION:
            raise ValueError(f"{path} has version {table['version']}, not {VERSION}")
        return {name: TileConfig(**fields) for name, fields in table["winners"].items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no table of tiles: {error}") from error


@cache
def tables() -> tuple[dict[str, TileConfig], ...]:
    """The user's and the project's, read once. A user's table that cannot be read is passed over with one line."""
    found = []
    try:
        found.append(load(user_path()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        print(f"matmul_grad: the tuned tiles are not used: {error}", file=sys.stderr)
    return (*found, load(OWN))


def find(problem: Problem, target: Target) -> TileConfig | None:
    """The measured winner of a problem, if there is one."""
    name = key(problem, target)
    return next((table[name] for table in tables() if name in table), None)
