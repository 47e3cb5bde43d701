"""A thread that finds its core taken moves to one that is not, and where it may run stays as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numba
import numpy as np
import pytest

from matmul_grad.kernels.cpu import cores
from matmul_grad.kernels.cpu.job import CORES, HEADER

pytestmark = pytest.mark.skipif(not cores.LINUX, reason="this system does not say where threads run")


@numba.njit
def enter(job):
    cores.clear_cores(job)
    return cores.take_core(job)


@numba.njit
def enter_again(job):
    free = cores.take_core(job)
    if not free:
        cores.leave_core(job)
    return free, cores.get_core()


@pytest.fixture
def allowed() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    for function in (enter, enter_again):  # compiled now: a thread does not stay where it is that long
        function(np.zeros(HEADER, np.int64).ctypes.data)
    yield before
    os.sched_setaffinity(0, before)


def taken(job: np.ndarray) -> set[int]:
    return {64 * word + bit for word in range(HEADER - CORES) for bit in range(64) if int(job[CORES + word]) >> bit & 1}


def test_a_thread_on_a_taken_core_moves(allowed: set[int]) -> None:
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    job = np.zeros(HEADER, np.int64)
    for core in sorted(allowed):
        os.sched_setaffinity(0, {core})
        assert enter(job.ctypes.data) and taken(job) == {core}
        # The lesser number of cores leaves no doubt where the move ends.
        other = min(allowed - {core})
        os.sched_setaffinity(0, {core, other})
        assert enter_again(job.ctypes.data) == (False, other)
        assert os.sched_getaffinity(0) == {core, other}
        assert taken(job) == {core, other}


def test_a_thread_that_may_not_move_stays(allowed: set[int]) -> None:
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    job = np.zeros(HEADER, np.int64)
    assert enter(job.ctypes.data)
    assert enter_again(job.ctypes.data) == (False, core)
    assert os.sched_getaffinity(0) == {core} and taken(job) == {core}
