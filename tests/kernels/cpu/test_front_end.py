"""Numba's front end: compiled functions return what Python does, raise nothing, and are no more than needed."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable

import pytest

from matmul_grad.kernels.cpu import build, config, front_end, host, schedule
from matmul_grad.kernels.cpu.front_end import jit
from matmul_grad.kernels.cpu.memory import INT64, get, number_of, put
from matmul_grad.kernels.cpu.numba_settings import needed_settings

SIGNATURE = INT64(INT64)


def load(kernels: build.Kernels) -> build.Loaded:
    machine = host.machine(host.cpu().isa)
    with needed_settings():
        code = machine.llvm().emit_object(build.to_module(kernels, machine, ()))
    return build.Loaded(code, machine, {})


def call(loaded: build.Loaded, name: str, words: list[int]) -> list[int]:
    at = (ctypes.c_int64 * 8)(*words)
    ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(loaded.address(name))(ctypes.addressof(at))
    return list(at)


def blocks(at):
    rows, columns = schedule.plan_blocks(get(at, 0), get(at, 1), get(at, 2), get(at, 3))
    put(at, 0, rows)
    put(at, 1, columns)
    return 0


def others(at):
    work = number_of(get(at, 4))
    tiles, panels, threads = get(at, 0), get(at, 1), get(at, 2)
    split = schedule.plan_split_k(tiles, panels, get(at, 3), 1, threads)
    transposed = schedule.plan_transposed_c(tiles, panels, panels, 1, 16)
    put(at, 1, schedule.plan_grain_tiles(work, tiles * panels))
    put(at, 3, schedule.plan_threads_per_product(tiles, threads))
    put(at, 2, schedule.plan_threads(work, threads))
    put(at, 5, 1 if split else 0)
    put(at, 6, 1 if transposed else 0)
    put(at, 0, schedule.plan_k(tiles, 384, 128))
    return 0


def bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def test_plans_are_those_of_python() -> None:
    loaded = load({"blocks": (blocks, SIGNATURE), "others": (others, SIGNATURE)})
    chosen = random.Random(1)
    for _ in range(200):
        tiles, panels, threads, least = (chosen.randint(1, most) for most in (400, 90, 64, 12))
        expected = config.split_c(tiles, panels, threads, least)
        assert tuple(call(loaded, "blocks", [tiles, panels, threads, least])[:2]) == expected
        work = chosen.uniform(1, 1e3) ** chosen.randint(1, 5)
        assert call(loaded, "others", [tiles, panels, threads, least, bits(work)])[:7] == [
            config.k_block(tiles, 384, 128),
            config.grain_tiles(work, tiles * panels),
            config.useful_threads(work, threads),
            config.threads_per_product(tiles, threads),
            bits(work),
            config.prefer_split_k(tiles, panels, least, 1, threads),
            config.prefer_transposed_c(tiles, panels, panels, 1, 16),
        ]


@jit
def scaled(number, factor):
    return number * factor


def calls(at):
    put(at, 0, scaled(get(at, 0), 2) + scaled(get(at, 1), 3) + scaled(get(at, 2), get(at, 3)))
    return 0


def test_constants_make_no_new_function() -> None:
    with needed_settings():
        texts = list(front_end.lowered(calls, SIGNATURE, "calls", set()))
    assert len(texts) == 3, "the C function, what it calls, and the helper"
    assert call(load({"calls": (calls, SIGNATURE)}), "calls", [5, 7, 11, 13])[0] == 10 + 21 + 143


def raises(at):
    """Where the step is 0."""
    total = 0
    for number in range(0, get(at, 0), get(at, 1)):
        total += number
    return total


def test_a_kernel_that_may_raise_is_refused() -> None:
    with pytest.raises(RuntimeError, match=f"the kernels raises refer to {front_end.RAISED}"):
        load({"raises": (raises, SIGNATURE)})


@jit
def quotients(at):
    put(at, 2, get(at, 0) // get(at, 1))
    put(at, 3, get(at, 0) % 7)


def divides(at):
    quotients(at)
    return 0


@pytest.mark.parametrize(("value", "step"), [(7, 2), (-7, 2), (7, -2), (-7, -2), (0, 5)])
def test_divisions_are_pythons(value: int, step: int, divide: Callable[[list[int]], list[int]]) -> None:
    assert divide([value, step])[2:4] == [value // step, value % 7]


@pytest.fixture(scope="module")
def divide() -> Callable[[list[int]], list[int]]:
    loaded = load({"divides": (divides, SIGNATURE)})
    return lambda words: call(loaded, "divides", words)
