"""`matmul_grad.bench.compare`: two functions of your own on shapes of your own, by the bench's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import testing
from . import correctness, inputs, timer
from .backends import OfTorch, call_of, products_of
from .devices import Cpu, Gpu
from .timer import Spread
from .workloads import PASSES, Workload

__all__ = ["Comparison", "compare"]


class Comparison(NamedTuple):
    """One shape: seconds a call of each, and B's time over A's by rounds, above 1 where A is faster.

    ``same_bits``: the two gave the same result in every bit. Where sums are long, one function is then likely to be
    the other in disguise.
    """

    shape: tuple[int, int, int]
    a: Spread
    b: Spread
    ratio: Spread
    same_bits: bool
    rounds: int

    def __str__(self) -> str:
        m, n, k = self.shape
        twin = ", the same bits" if self.same_bits else ""
        return f"{m}×{n}×{k}: {self.ratio}, {self.a.median * 1e6:.4g} and {self.b.median * 1e6:.4g} µs{twin}"


def compare(
    fn_a: Callable[[Tensor, Tensor], Tensor],
    fn_b: Callable[[Tensor, Tensor], Tensor],
    shapes: Iterable[tuple[int, int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    product: str = "forward",
    layout: str = "NN",
    device: str = "cpu",
    seconds: float = 0.25,
) -> list[Comparison]:
    """Time two functions (a, b) → a · b beside each other, if both are right.

    t_b / t_a  for C = A · B, dA = dC · Bᵀ, dB = Aᵀ · dC, or all three through autograd

    shapes      (m, n, k): A (m, k), B (k, n)
    strides     layout NN, NT, TN or TT: A and B by rows (N) or by columns (T)
    dtypes      float16, bfloat16, float32, float64
    aliasing    operands are copies that go round past the last cache; nothing of yours is touched
    rounding    each function is held against float64 first, on integers and on normal values
    errors      ValueError for arguments that cannot be, and where fn_a is fn_b; AssertionError where one is wrong
    determinism the operands are always the same; times are not
    source      bench/backends.py

    Both run in this process, on its threads: two libraries with pools of threads of their own fight for the cores here,
    and `matmul-grad bench` is what keeps them apart. ``product`` is forward, dgrad, wgrad or step; ``seconds`` is for a
    shape.

    >>> import torch, matmul_grad
    >>> from matmul_grad import bench
    >>> (found,) = bench.compare(matmul_grad.mm, torch.mm, [(64, 64, 64)], seconds=0.01)
    >>> found.shape, found.ratio.low <= found.ratio.median <= found.ratio.high
    ((64, 64, 64), True)
    """
    if fn_a is fn_b:
        raise ValueError("fn_a and fn_b are one function: there is nothing to compare")
    if product not in PASSES or layout not in testing.LAYOUTS or dtype not in testing.SHORT:
        raise ValueError(f"product of {PASSES}, layout of {testing.LAYOUTS}, dtype of {tuple(testing.SHORT)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA device here")
    found = []
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shapes are (m, n, k), each at least 1, got {shape}")
        workload = Workload(
            product, testing.SHORT[dtype], layout, *shape, threads=torch.get_num_threads(), device=device
        )
        found.append(measured({"fn_a": OfTorch(fn_a), "fn_b": OfTorch(fn_b)}, workload, seconds))
    return found


def measured(libraries: dict[str, OfTorch], workload: Workload, seconds: float) -> Comparison:
    where: Cpu | Gpu = Cpu() if workload.device == "cpu" else Gpu()
    normal = inputs.draw(workload, "normal", workload.device)
    sets = list(inputs.copies(normal, inputs.copies_past(where.cache_bytes(), workload.held, where.free_bytes())))
    batches, digests = {}, set()
    for name, library in libraries.items():
        correctness.assert_correct(library, workload, device=workload.device, name=name)
        calls = [call_of(library, workload, each) for each in sets]
        digests.add(correctness.digest(tuple(products_of(library, workload, calls[0]()).values())))
        batches[name] = timer.batch_of(inputs.alternating(calls), where.wait)
    times = timer.time_interleaved(batches, seconds)
    ratios = timer.ratios(times["fn_b"], times["fn_a"])
    a, b, ratio = (timer.quartiles(rounds) for rounds in (times["fn_a"], times["fn_b"], ratios))
    return Comparison(workload.shape, a, b, ratio, len(digests) == 1, len(ratios))
