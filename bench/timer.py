"""Interleaved timing: backends alternate, so that whatever slows the machine slows all of them.

One round gives every backend one batch of calls, and the order rotates by one from round to round. A batch lasts
at least a millisecond. What is reported of a backend is the median and the quartiles of its batches, per call;
what is reported of two is the ratio of medians. Nothing is dropped, and no minimum is taken.

`interleaved` times functions of this process; `time_interleaved` times batches, each a function that runs one and
returns seconds per call, in this process or another. It accepts slow backends: where five rounds would take PATIENCE
times the seconds asked for, three are enough.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter, process_time
from typing import NamedTuple

import torch

__all__ = [
    "AT_REST", "PROTOCOL", "Batch", "Quartiles", "batch_of", "interleaved", "quartiles", "ratio", "rounded",
    "share_of_core", "summary", "threads", "time_interleaved",
]  # fmt: skip

BATCH = 1e-3  # seconds: a thousand times what reading the clock costs
AT_REST = 0.97  # of a core: with less, others ran there too, and the times are theirs as well
FEWEST, ENOUGH, MOST = 3, 5, 199  # rounds
PATIENCE = 6
SLOW = 0.5  # seconds: a call that needs no second one to be warm
PROTOCOL = "interleaved rounds of ≥ 1 ms in turning order; medians and quartiles of a call"

Batch = Callable[[], float]


class Quartiles(NamedTuple):
    """Seconds a call, by rounds: the first quartile, the median and the third."""

    low: float
    median: float
    high: float


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


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    seconds: float = 0.25,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds a call, for each backend and round: ``seconds`` in all, but 5 rounds at least and 199 at most.

    ``wait`` is called before the clock is read: torch.cuda.synchronize where calls return early.

    >>> times = interleaved({"nothing": lambda: None, "something": lambda: sum(range(9999))}, seconds=0.01)
    >>> quartiles(times["nothing"]).median < quartiles(times["something"]).median
    True
    """
    lengths = {name: calls_in_batch(call, wait) for name, call in functions.items()}
    batches = {name: functools.partial(batch, call, lengths[name], wait) for name, call in functions.items()}
    return rounds(batches, lambda done, spent: done >= ENOUGH and spent >= seconds)


def share_of_core() -> Callable[[], float]:
    """Watch from here on: the call says what share of one core's time this process has had since.

    >>> share = share_of_core()
    >>> sum(range(100_000)) > 0 and share() > 0
    True
    """
    wall, used = perf_counter(), process_time()
    return lambda: (process_time() - used) / (perf_counter() - wall)


def calls_in_batch(call: Callable[[], object], wait: Callable[[], object]) -> int:
    """How many calls last a batch, from growing trials that are the warm-up too."""
    calls = 1
    batch(call, calls, wait)
    while (elapsed := batch(call, calls, wait) * calls) < BATCH:
        calls = max(2 * calls, min(100 * calls, int(calls * BATCH / max(elapsed, 1e-9))))
    return calls


def batch(call: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    """Seconds a call, over ``calls`` of them."""
    wait()
    start = perf_counter()
    for _ in range(calls):
        call()
    wait()
    return (perf_counter() - start) / calls


def quartiles(times: list[float]) -> Quartiles:
    """The quartiles of one backend's rounds.

    >>> quartiles([3.0, 1.0, 2.0, 5.0, 4.0])
    Quartiles(low=2.0, median=3.0, high=4.0)
    """
    return Quartiles(*statistics.quantiles(times, n=4, method="inclusive"))


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


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Their median over ours: above 1, we are faster.

    >>> ratio([2.0, 3.0, 4.0], [1.0, 1.5, 9.0])
    2.0
    """
    return quartiles(theirs).median / quartiles(ours).median


def nothing() -> None:
    pass


def batch_of(call: Callable[[], object]) -> Batch:
    """A function that runs one batch and returns seconds per call; the batch's length is found out here.

    >>> batch_of(lambda: None)() > 0
    True
    """
    slow = batch(call, 1, nothing) > SLOW
    calls = 1 if slow else calls_in_batch(call, nothing)
    return lambda: batch(call, calls, nothing)


def time_interleaved(batches: Mapping[str, Batch], seconds: float) -> dict[str, list[float]]:
    """Seconds per call, for each backend and round; the order rotates by one from round to round.

    >>> time_interleaved({"a": lambda: 1.0, "b": lambda: 2.0}, seconds=0.0)
    {'a': [1.0, 1.0, 1.0], 'b': [2.0, 2.0, 2.0]}
    """
    return rounds(
        batches,
        lambda done, spent: (done >= ENOUGH and spent >= seconds) or (done >= FEWEST and spent >= PATIENCE * seconds),
    )


def rounds(batches: Mapping[str, Batch], is_enough: Callable[[int, float], bool]) -> dict[str, list[float]]:
    """Rounds until ``is_enough(rounds done, seconds spent)``, MOST at most."""
    times: dict[str, list[float]] = {name: [] for name in batches}
    order, start = list(batches), perf_counter()
    for done in range(MOST):
        if is_enough(done, perf_counter() - start):
            break
        for name in order:
            times[name].append(batches[name]())
        order.append(order.pop(0))
    return times
