"""The compiled sets that a wheel carries, beside these sources: found by what they were compiled from and for.

An object does not depend on the versions of Python, Numba, LLVM and torch that it is used with: it is System V machine
code that calls by name what `build.load` binds, and whatever differs between them is read from memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import object_file
from .levels import Level, Machine, fitting

FOLDER = Path(__file__).parent / "objects"


def file_name(key: str, name: str, sources: str, level: Level) -> str:
    """Of the set ``name``, compiled from ``sources`` for ``level``."""
    machine = level.machine
    return object_file.file_name(name, key, sources, machine.triple, machine.cpu, machine.features)


def candidates(key: str, name: str, sources: str, machine: Machine) -> Iterator[Path]:
    """Where the set may be, the best level that runs on ``machine`` first."""
    if sources:
        for level in fitting(machine):
            yield FOLDER / file_name(key, name, sources, level)


def find(key: str, name: str, sources: str, machine: Machine) -> bytes | None:
    """The set as the wheel carries it; None where there is none for these sources and this machine."""
    codes = (object_file.read(path) for path in candidates(key, name, sources, machine))
    return next((code for code in codes if code is not None), None)
