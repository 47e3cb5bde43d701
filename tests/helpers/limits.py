"""Time limits of tests: they end what hangs, and are far above what anything takes on a slow or busy machine."""

from __future__ import annotations

import functools
import time

# Seconds of one unit of work on an idle 2.4 GHz core of 2021. The unit is fixed, so the ratio measures the machine.
REFERENCE = 0.05


def unit_of_work() -> float:
    """Seconds that a fixed amount of Python bytecode takes here and now, the slowest of five runs."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        sum(i * i for i in range(1_000_000))
        times.append(time.perf_counter() - begin)
    return max(times)


@functools.cache
def slowness() -> float:
    """How many times slower than the reference this machine is, at least 1; measured once a process."""
    return max(1.0, unit_of_work() / REFERENCE)


def scaled(seconds: float) -> float:
    """A time limit of so many seconds on the reference machine, as seconds of this one."""
    return seconds * slowness()
