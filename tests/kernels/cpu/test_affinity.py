"""A thread whose core is claimed moves to a free one, and its affinity stays as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numba
import numpy as np
import pytest

from matmul_grad.kernels.cpu import affinity
from matmul_grad.kernels.cpu.schedule import CORES, HEADER

pytestmark = pytest.mark.skipif(not affinity.LINUX, reason="this system does not report where threads run")


@numba.njit
def claim(schedule):
    affinity.clear_cores(schedule)
    return affinity.claim_core(schedule)


@numba.njit
def claim_again(schedule):
    free = affinity.claim_core(schedule)
    if not free:
        affinity.move_to_free_core(schedule)
    return free, affinity.current_core()


@pytest.fixture
def allowed() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    for function in (claim, claim_again):  # compiled now: a thread does not stay where it is that long
        function(np.zeros(HEADER, np.int64).ctypes.data)
    yield before
    os.sched_setaffinity(0, before)


def claimed(schedule: np.ndarray) -> set[int]:
    masks = (int(schedule[CORES + word]) for word in range(HEADER - CORES))
    return {64 * word + bit for word, mask in enumerate(masks) for bit in range(64) if mask >> bit & 1}


def test_thread_on_claimed_core_moves_to_free_core(allowed: set[int]) -> None:
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    schedule = np.zeros(HEADER, np.int64)
    for core in sorted(allowed):
        os.sched_setaffinity(0, {core})
        assert claim(schedule.ctypes.data) and claimed(schedule) == {core}
        # With two cores there is only one where the move can end.
        other = min(allowed - {core})
        os.sched_setaffinity(0, {core, other})
        assert claim_again(schedule.ctypes.data) == (False, other)
        assert os.sched_getaffinity(0) == {core, other}
        assert claimed(schedule) == {core, other}


def test_thread_with_one_allowed_core_stays(allowed: set[int]) -> None:
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    schedule = np.zeros(HEADER, np.int64)
    assert claim(schedule.ctypes.data)
    assert claim_again(schedule.ctypes.data) == (False, core)
    assert os.sched_getaffinity(0) == {core} and claimed(schedule) == {core}
