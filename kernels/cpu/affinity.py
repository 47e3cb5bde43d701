"""One core for each thread of a call, where the system has woken two threads on one.

A thread of the pool that slept may wake on the core of the thread that called it, and stays there for tens of
milliseconds: the caller computes the blocks meanwhile, so the core never looks overloaded. A thread whose core is
claimed by another of the same call moves to a free one, and may run anywhere again from there.
"""

from __future__ import annotations

from numba.core import types

from .build import SCHEDULER
from .memory import fetch_or, get, jit, put, stack_words
from .schedule import CORE_WORDS, CORES

LINUX = SCHEDULER != ()
BYTES = 8 * CORE_WORDS

current_core = types.ExternalFunction("sched_getcpu", types.int32())
get_affinity = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, types.int64, types.int64))
set_affinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))
two_masks = stack_words(2 * CORE_WORDS)


@jit
def claim_core(schedule):
    """Claim this thread's core for the call; False where another of its threads has claimed it."""
    if not LINUX:
        return True
    core = current_core()
    if core < 0 or core >= 8 * BYTES:
        return True
    bit = 1 << (core & 63)
    return fetch_or(schedule, CORES + core // 64, bit) & bit == 0


@jit
def clear_cores(schedule):
    for word in range(CORE_WORDS):
        put(schedule, CORES + word, 0)


@jit
def move_to_free_core(schedule):
    """Move this thread to a core that it may use and that no thread of the call has claimed, if there is one."""
    if LINUX:
        allowed = two_masks()
        free, some = allowed + BYTES, 0
        if get_affinity(0, BYTES, allowed) == 0:
            for word in range(CORE_WORDS):
                put(free, word, get(allowed, word) & ~get(schedule, CORES + word))
                some |= get(free, word)
        if some != 0 and set_affinity(0, BYTES, free) == 0:
            set_affinity(0, BYTES, allowed)
            claim_core(schedule)
