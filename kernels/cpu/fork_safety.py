"""Locks that a forked child finds free, and whether this process is such a child."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

_locks: list[Any] = []
_held: list[Any] = []  # by the thread that is forking
_is_child = False


def fork_safe_lock() -> contextlib.AbstractContextManager[Any]:
    """A reentrant lock that no other thread holds during a fork: a fork waits until it is released.

    Without it a child finds the lock taken by a thread that it does not have, for ever.
    """
    lock = threading.RLock()
    _locks.append(lock)
    return lock


def is_child() -> bool:
    """Whether this process was forked after this module had been imported."""
    return _is_child


def _before() -> None:
    """Acquire every lock or none, so that there is no order in which they have to be acquired."""
    while not _acquire_all():
        time.sleep(0.001)


def _acquire_all() -> bool:
    taken: list[Any] = []
    try:
        for lock in _locks:
            if not lock.acquire(blocking=False):
                break
            taken.append(lock)
        else:
            _held.extend(taken)
            taken = []
            return True
    finally:
        for lock in taken:
            lock.release()
    return False


def _after() -> None:
    while _held:
        _held.pop().release()


def _after_in_child() -> None:
    global _is_child
    _is_child = True
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
