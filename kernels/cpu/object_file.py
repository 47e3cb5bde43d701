"""Files of compiled sets: their names, and reading and writing them whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path


def file_name(name: str, *key: str) -> str:
    """The file of the set ``name``, for all that its code depends on."""
    return f"{name}-{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:24]}.o"


def read(path: Path) -> bytes | None:
    """The code in a file; None where it is missing, unreadable, cut short or changed."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:32], data[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def write(path: Path, code: bytes) -> None:
    """Keep ``code``, whole or not at all; a folder that cannot be written only costs the next start."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
