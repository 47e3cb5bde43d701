"""Tuned tile configurations: those of the project, and the user's from `matmul-grad tune`, which take precedence.

A file is JSON: {"version": 1, "winners": {key of a problem: fields of its TileConfig}}; `tune` adds its measurements.
"""

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
BUILT_IN = Path(__file__).with_name("tuned_configs.json")


def user_path() -> Path:
    """The file of the user's configurations: $MATMUL_GRAD_TUNED, or tuned.json in the user's configuration folder."""
    named = os.environ.get("MATMUL_GRAD_TUNED")
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(named or Path(folder, "matmul_grad", "tuned.json")).expanduser()


def key(problem: Problem, target: Target) -> str:
    """The name of a problem on a GPU in a file.

    >>> key(Problem(1, 2, 3, "bfloat16", "N", "T", tma=True), Target(90, 132, 232448))
    'sm90x132 1 2 3 bfloat16 N T ieee aligned tma 1'
    """
    *sizes, aligned, tma, batch, invariant, result = astuple(problem)
    flags = "aligned" if aligned else "narrow", "tma" if tma else "pointers", batch, *["invariant"] * invariant
    flags += (result,) if result else ()
    return " ".join(map(str, (f"sm{target.arch}x{target.sms}", *sizes, *flags)))


def load(path: Path) -> dict[str, TileConfig]:
    """The configurations of a file. Raises OSError where it cannot be read, ValueError where it is not valid."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"{path} has version {content['version']}, not {VERSION}")
        return {name: TileConfig(**fields) for name, fields in content["winners"].items()}
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a file of tuned configurations: {error}") from error


@cache
def read_files() -> tuple[dict[str, TileConfig], ...]:
    """The user's configurations and the project's, read once. An invalid file of the user's is named and ignored."""
    found = []
    try:
        found.append(load(user_path()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        print(f"matmul_grad: tuned configurations are not used: {error}", file=sys.stderr)
    return (*found, load(BUILT_IN))


def find(problem: Problem, target: Target) -> TileConfig | None:
    """The tuned configuration of a problem, if there is one."""
    files = [configs for configs in read_files() if configs]
    if not files:  # the name takes longer than all else of a choice that is known
        return None
    name = key(problem, target)
    return next((configs[name] for configs in files if name in configs), None)
