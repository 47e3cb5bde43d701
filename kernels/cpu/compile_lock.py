"""One compilation of a set at a time, among all processes and threads that share a cache folder.

The lock is the system's, on a file beside the object: it ends with its holder, however that ends. Where a file system
has no locks, a folder cannot be written, or a holder takes too long, the set is compiled once more, which is only slow.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

LONGEST = 300.0  # seconds to wait for a holder: several times what a set takes on a busy machine
STEP = 0.05


@contextlib.contextmanager
def compiling(path: Path | None) -> Iterator[None]:
    """A block that compiles what is to be kept in ``path``, after every other such block if that can be."""
    lock = None if path is None or fcntl is None else _open(path.with_suffix(".lock"))
    try:
        if lock is not None and _acquire(lock):
            try:
                yield
            finally:
                assert path is not None
                with contextlib.suppress(OSError):  # whoever has the file open already finds the object
                    path.with_suffix(".lock").unlink()
        else:
            yield
    finally:
        if lock is not None:
            os.close(lock)


def _open(path: Path) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        return None


def _acquire(lock: int) -> bool:
    """Whether the lock is acquired; False where there are none, or its holder keeps it for LONGEST seconds."""
    limit = time.monotonic() + LONGEST
    while time.monotonic() < limit:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(STEP)
        except OSError:
            return False
    return False
