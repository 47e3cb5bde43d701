"""Wheels built from a copy of the checkout, and their installation into an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Built(NamedTuple):
    """A copy of the checkout, the wheel of it, and the wheel of its sdist alone."""

    copy: Path
    direct: Path
    sdist: Path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """The checkout without what was generated in it."""
    generated = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, target, ignore=generated)
    return target


def build(checkout: Path, out: Path, *options: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, cwd=checkout)


def install(wheel: Path, target: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=target)
