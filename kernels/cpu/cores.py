"""A core for each thread of a call, where the system has woken two on one.

A pool's thread that slept may wake on the core of the thread that called it, and stays there for tens of milliseconds:
the caller takes the parts meanwhile, so the core never looks overloaded. A thread that finds its core taken by another
of the same call moves to one that is not, and may run anywhere again from there.
"""

from __future__ import annotations

from numba.core import types

from .build import SCHEDULER
from .job import CORE_WORDS, CORES
from .memory import get, jit, put, set_bits, stack_words

LINUX = SCHEDULER != ()
BYTES = 8 * CORE_WORDS

get_core = types.ExternalFunction("sched_getcpu", types.int32())
get_cores = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, types.int64, types.int64))
set_cores = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, types.int64, types.int64))
two_masks = stack_words(2 * CORE_WORDS)


@jit
def take_core(job):
    """Enter this thread's core in the job; False where another thread of the job is on it."""
    if not LINUX:
        return True
    core = get_core()
    if core < 0 or core >= 8 * BYTES:
        return True
    bit = 1 << (core & 63)
    return set_bits(job, CORES + core // 64, bit) & bit == 0


@jit
def clear_cores(job):
    for word in range(CORE_WORDS):
        put(job, CORES + word, 0)


@jit
def leave_core(job):
    """Move this thread to a core that it may use and that no thread of the job has taken, if there is one."""
    if LINUX:
        allowed = two_masks()
        untaken, some = allowed + BYTES, 0
        if get_cores(0, BYTES, allowed) == 0:
            for word in range(CORE_WORDS):
                put(untaken, word, get(allowed, word) & ~get(job, CORES + word))
                some |= get(untaken, word)
        if some != 0 and set_cores(0, BYTES, untaken) == 0:
            set_cores(0, BYTES, allowed)
            take_core(job)
