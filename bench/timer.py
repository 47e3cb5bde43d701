"""Interleaved timing: backends alternate, so that whatever slows the machine slows all of them.

One round gives every backend one batch of calls, and the order rotates by one from round to round. A batch lasts
BATCH at least, after one call that warms the caches, which are another's then. What is reported of a backend is the
median and the quartiles of its batches, per call; what is reported of two is the median of the ratios of their rounds.
Nothing is dropped, and no minimum is taken.

`interleaved` times functions of this process; `time_interleaved` times batches, each a function that runs one and
returns seconds per call, in this process or another. Slow backends are accepted: where five rounds would take PATIENCE
times the seconds asked for, three are enough.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter, process_time
from typing import NamedTuple

import torch

__all__ = [
    "AT_REST", "PROTOCOL", "Batch", "Spread", "batch_of", "interleaved", "on_one_core", "quartiles", "ratio",
    "rounded", "share_of_core", "summary", "threads", "time_interleaved",
]  # fmt: skip

BATCH = 5e-3  # seconds: thousands of times what reading the clock costs
LONG = 0.05  # seconds: a call that needs no other before it to be warm
AT_REST = 0.97  # of a core: with less, others ran there too, and the times are theirs as well
FEWEST, ENOUGH, MOST = 3, 5, 199  # rounds
PATIENCE = 6
CALL_CLOCK, DEVICE_CLOCK = "call", "device"  # until a call has returned and is done; of a GPU alone
PROTOCOL = "interleaved rounds of ≥ 5 ms in turning order; medians and quartiles of a call"

Batch = Callable[[], float]


class Spread(NamedTuple):
    """A figure by rounds, with its quartiles: half of the rounds lie between them."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch's threads set to ``count`` inside, put back after; None leaves them.

    >>> with threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """A block in which this thread stays on one core, where the system can hold it there.

    >>> with on_one_core():
    ...     seconds = batch_of(nothing)()
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def nothing() -> None:
    pass


def interleaved(
    functions: Mapping[str, Callable[[], object]], seconds: float = 0.25, wait: Callable[[], object] = nothing
) -> dict[str, list[float]]:
    """Seconds a call, for each backend and round, as `time_interleaved`.

    ``wait`` is called before the clock is read: torch.cuda.synchronize where calls return early.

    >>> times = interleaved({"nothing": lambda: None, "something": lambda: sum(range(9999))}, seconds=0.01)
    >>> quartiles(times["nothing"]).median < quartiles(times["something"]).median
    True
    """
    return time_interleaved({name: batch_of(call, wait) for name, call in functions.items()}, seconds)


def share_of_core() -> Callable[[], float]:
    """Watch from here on: the call says what share of one core's time this process has had since.

    >>> share = share_of_core()
    >>> sum(range(100_000)) > 0 and share() > 0
    True
    """
    wall, used = perf_counter(), process_time()
    return lambda: (process_time() - used) / (perf_counter() - wall)


def batch_of(call: Callable[[], object], wait: Callable[[], object] = nothing) -> Batch:
    """Seconds a call over a batch of at least BATCH, whose length is found out here.

    >>> batch_of(lambda: None)() > 0
    True
    """
    call()
    once = batch(call, 1, wait)
    while once < BATCH / 5 and (more := batch(call, 16, wait)) < once / 2:
        once = more  # a first call that is slow says little
    calls = max(1, round(BATCH / max(once, 1e-8)))

    def run() -> float:
        if once < LONG:
            call()
        return batch(call, calls, wait)

    return run


def batch(call: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    """Seconds a call, over ``calls`` of them."""
    wait()
    start = perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (perf_counter() - start) / calls


def quartiles(times: list[float]) -> Spread:
    """The quartiles of one backend's rounds.

    >>> quartiles([3.0, 1.0, 2.0, 5.0, 4.0])
    Spread(low=2.0, median=3.0, high=4.0)
    """
    return Spread(*statistics.quantiles(times, n=4, method="inclusive"))


def summary(times: list[float]) -> dict[str, float]:
    """The quartiles as they are kept in a file.

    >>> summary([3.0, 1.0, 2.0, 5.0, 4.0])
    {'low': 2.0, 'median': 3.0, 'high': 4.0}
    """
    return {name: rounded(seconds) for name, seconds in quartiles(times)._asdict().items()}


def rounded(value: float) -> float:
    """Six digits: more than any clock here is good for.

    >>> rounded(1 / 3)
    0.333333
    """
    return float(f"{value:.6g}")


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """Their time over ours, round by round: above 1, we are faster.

    The two times of a round lie next to each other, so a ratio of theirs knows nothing of a drift of the machine's.
    """
    return [them / us for them, us in zip(theirs, ours, strict=True)]


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The median of the rounds' ratios.

    >>> ratio([2.0, 3.0, 4.0], [1.0, 1.5, 9.0])
    2.0
    """
    return statistics.median(ratios(theirs, ours))


def time_interleaved(batches: Mapping[str, Batch], seconds: float) -> dict[str, list[float]]:
    """Seconds per call, for each backend and round; the order rotates by one from round to round.

    >>> time_interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, seconds=0.0)
    {'a': [1.0, 1.0, 1.0], 'b': [2.0, 2.0, 2.0]}
    """
    times: dict[str, list[float]] = {name: [] for name in batches}
    order, start = list(batches), perf_counter()
    for done in range(MOST):
        spent = perf_counter() - start
        if (done >= ENOUGH and spent >= seconds) or (done >= FEWEST and spent >= PATIENCE * seconds):
            break
        for name in order:
            times[name].append(batches[name]())
        order.append(order.pop(0))
    return times
