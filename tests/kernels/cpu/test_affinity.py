"""A thread whose core is claimed moves to a free one, and its affinity stays as it was."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from matmul_grad.kernels.cpu import affinity, build, host
from matmul_grad.kernels.cpu.memory import INT64
from matmul_grad.kernels.cpu.numba_settings import needed_settings
from matmul_grad.kernels.cpu.schedule import CORES, HEADER

pytestmark = pytest.mark.skipif(not affinity.LINUX, reason="this system does not report where threads run")


def claim(schedule):
    affinity.clear_cores(schedule)
    return 1 if affinity.claim_core(schedule) else 0


def claim_again(schedule):
    """The core that the thread is on; less 1000 where its own was claimed."""
    if affinity.claim_core(schedule):
        return affinity.current_core()
    affinity.move_to_free_core(schedule)
    return affinity.current_core() - 1000


@pytest.fixture(scope="module")
def compiled() -> SimpleNamespace:
    kernels = {"claim": (claim, INT64(INT64)), "claim_again": (claim_again, INT64(INT64))}
    machine = host.machine(host.cpu().isa)
    with needed_settings():
        code = machine.llvm().emit_object(build.to_module(kernels, machine, ()))
    loaded = build.Loaded(code, machine, {})
    call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    return SimpleNamespace(**{name: call(loaded.address(name)) for name in kernels}, kept=loaded)


@pytest.fixture
def allowed() -> Iterator[set[int]]:
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def claimed(schedule: np.ndarray) -> set[int]:
    masks = (int(schedule[CORES + word]) for word in range(HEADER - CORES))
    return {64 * word + bit for word, mask in enumerate(masks) for bit in range(64) if mask >> bit & 1}


def test_thread_on_claimed_core_moves_to_free_core(compiled: SimpleNamespace, allowed: set[int]) -> None:
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    schedule = np.zeros(HEADER, np.int64)
    for core in sorted(allowed):
        os.sched_setaffinity(0, {core})
        assert compiled.claim(schedule.ctypes.data) and claimed(schedule) == {core}
        # With two cores there is only one where the move can end.
        other = min(allowed - {core})
        os.sched_setaffinity(0, {core, other})
        assert compiled.claim_again(schedule.ctypes.data) == other - 1000
        assert os.sched_getaffinity(0) == {core, other}
        assert claimed(schedule) == {core, other}


def test_thread_with_one_allowed_core_stays(compiled: SimpleNamespace, allowed: set[int]) -> None:
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    schedule = np.zeros(HEADER, np.int64)
    assert compiled.claim(schedule.ctypes.data)
    assert compiled.claim_again(schedule.ctypes.data) == core - 1000
    assert os.sched_getaffinity(0) == {core} and claimed(schedule) == {core}
