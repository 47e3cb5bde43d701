"""Integers are exact for any shapes, strides, offsets and threads, also in many mixed calls from several threads."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from dtypes import ACCELERATED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from matmul_grad import testing
from matmul_grad.kernels.cpu import driver
from matmul_grad.kernels.native import direct

sizes = st.integers(0, 40) | st.integers(60, 140)
dtypes = st.sampled_from([str(dtype).removeprefix("torch.") for dtype in ACCELERATED.values()])


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """An integer matrix as a view with drawn strides (0 and interleaved too) and offset, among NaN."""
    row_step, column_step = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    offset = draw(st.integers(0, 5))
    if draw(st.booleans()):
        strides = (row_step * max(1, columns), column_step)
    else:
        strides = (row_step, column_step * max(1, rows))
    last = offset + max(0, rows - 1) * strides[0] + max(0, columns - 1) * strides[1]
    memory = torch.full((last + 1,), float("nan"), dtype=dtype)
    view = memory.as_strided((rows, columns), strides, offset)
    # Rows may overlap: fill the memory that the view reaches, not the view.
    everywhere = torch.zeros(last + 1, dtype=torch.bool)
    everywhere.as_strided((rows, columns), strides, offset).fill_(True)
    memory[everywhere] = testing.integers(1, last + 1, dtype, seed)[0][everywhere]
    return view


@settings(max_examples=300, deadline=None)
@given(data=st.data(), m=sizes, n=sizes, k=sizes, name=dtypes, threads=st.integers(1, 4))
def test_integers_are_exact(data: st.DataObject, m: int, n: int, k: int, name: str, threads: int) -> None:
    dtype = getattr(torch, name)
    a, b = data.draw(matrices(m, k, dtype, 1)), data.draw(matrices(k, n, dtype, 2))
    out = torch.full((m, n), float("nan"), dtype=dtype)
    direct.multiply(driver.config(name), a, b, out, threads)
    testing.assert_same_bits(out, testing.exact_product(a, b), f"{name} {m}x{n}x{k} {a.stride()} {b.stride()}")


def soak(rounds: int) -> None:
    """Four threads multiply mixed sizes and compare each product's bits with the first of its kind."""
    random_sizes = random.Random(0)
    products = []
    for _ in range(24):
        m, n, k = (random_sizes.choice((1, 3, 17, 64, 130, 300)) for _ in range(3))
        dtype = random_sizes.choice(list(testing.DTYPES.values()))
        a, b = testing.normal(m, k, dtype, seed=1), testing.normal(k, n, dtype, seed=2)
        products.append((a, b, torch.ops.matmul_grad.mm(a, b)))
    failures: list[str] = []

    def work(worker: int) -> None:
        choose = random.Random(worker)
        for _ in range(rounds):
            a, b, expected = choose.choice(products)
            try:
                testing.assert_same_bits(torch.ops.matmul_grad.mm(a, b), expected)
            except AssertionError as error:
                failures.append(str(error))
                return

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def test_calls_from_four_threads_keep_their_bits() -> None:
    soak(250)


@pytest.mark.slow
def test_many_calls_from_four_threads_keep_their_bits() -> None:
    soak(10_000)
