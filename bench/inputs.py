"""Operands of a workload: values drawn on its device, in its layout, and the copies that calls rotate over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .workloads import Workload

IN_L1 = 32 << 10  # bytes: operands that fit stay there, since a call of such a product is overhead
MOST_COPIES = 8192
FEW = 64  # values of an operand, below which nothing is to be seen from their spread
LOOKED_AT = 1 << 20
DENSE = 4  # integers of float32 and float64 reach from -4 to 4
SUM = 20  # what sums of 16-bit integers should be in the mean: bfloat16 holds integers to 256


class Unfit(AssertionError):
    """Operands that a time would say nothing of; the message says why."""


class Operands(NamedTuple):
    """a (m, k), b (k, n) and the gradient (m, n) of their product; or batches of them."""

    a: Tensor
    b: Tensor
    grad: Tensor

    def of(self, product: str) -> tuple[Tensor, Tensor]:
        """The two factors of forward, dgrad or wgrad: transposed by their strides."""
        views = {
            "forward": (self.a, self.b),
            "dgrad": (self.grad, self.b.mT),
            "wgrad": (self.a.mT, self.grad),
        }
        return views[product]


def draw(workload: Workload, values: str = "normal", device: str = "cpu", seed: int = 0) -> Operands:
    """A, B and the gradient of C, drawn where they are used: the same in every process, with no memory but their own.

    Integers are such that a sum of products is exact in any order, in 16 bits too.

    >>> [tuple(x.shape) for x in draw(Workload("forward", "f32", "NT", 2, 3, 4))]
    [(2, 4), (4, 3), (2, 3)]
    >>> draw(Workload("forward", "f32", "NT", 2, 3, 4)).b.stride()
    (1, 4)
    """
    generator = torch.Generator(device).manual_seed(seed)
    m, n, k = workload.shape
    batch = (workload.batch,) if workload.batch > 1 else ()

    def one(rows: int, columns: int, order: str = "N") -> Tensor:
        size = (*batch, columns, rows) if order == "T" else (*batch, rows, columns)
        memory = torch.empty(size, dtype=workload.torch_dtype, device=device)
        fill = {"integers": fill_integers, "ones": fill_ones}.get(values, fill_normal)
        fill(memory, generator, max(m, n, k))
        return memory.mT if order == "T" else memory

    return Operands(one(m, k, workload.layout[0]), one(k, n, workload.layout[1]), one(m, n))


def fill_normal(memory: Tensor, generator: torch.Generator, longest: int) -> None:
    memory.normal_(generator=generator)


def fill_ones(memory: Tensor, generator: torch.Generator, longest: int) -> None:
    memory.fill_(1)


def fill_integers(memory: Tensor, generator: torch.Generator, longest: int) -> None:
    """From -4 to 4; in 16 bits -1, 0 and 1, rarer the longer the sums."""
    if memory.element_size() > 2:
        memory.random_(2 * DENSE + 1, generator=generator).sub_(DENSE)
        return
    one_in = min(250, max(3, round(2 * longest**0.5 / SUM)))
    memory.random_(one_in, generator=generator)
    memory.copy_((memory == 1).to(memory.dtype).sub_((memory == 0).to(memory.dtype)))


def assert_normal(operands: Sequence[Tensor]) -> None:
    """Zeros and other easy values take less power, so clocks rise, and a time of them is of no use.

    >>> assert_normal(draw(Workload("forward", "f32", "NN", 64, 64, 64)))
    >>> assert_normal([torch.zeros(64, 64)])
    Traceback (most recent call last):
    matmul_grad.bench.inputs.Unfit: operands are not standard normal: mean 0.000, deviation 0.000
    """
    for operand in operands:
        # One element in so many, so that a large operand is looked at from end to end.
        flat = operand.mT.reshape(-1) if operand.stride(-2) == 1 else operand.reshape(-1)
        some = flat[:: 1 + flat.numel() // LOOKED_AT].double()
        if some.numel() < FEW:
            continue
        mean, deviation = float(some.mean()), float(some.std())
        slack = 6 / some.numel() ** 0.5  # six deviations of either
        if not (abs(mean) < slack and abs(deviation - 1) < slack):
            raise Unfit(f"operands are not standard normal: mean {mean:.3f}, deviation {deviation:.3f}")


def copies_past(cache: int, held: int, free: int) -> int:
    """How many copies exceed a cache twice, so that none is found there when its turn comes again.

    >>> [copies_past(32 << 20, held, free=1 << 40) for held in (768, 49152, 1 << 30)]
    [1, 1366, 1]
    """
    if held <= IN_L1:
        return 1
    return max(1, min(-(-2 * cache // held), MOST_COPIES, free // (2 * held)))


def copies(operands: Operands, count: int) -> Iterator[Operands]:
    """The operands, and copies in memory of their own that lie as they do."""
    yield operands
    for _ in range(count - 1):
        yield Operands(*(operand.clone() for operand in operands))


def alternating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call that is another of ``calls`` each time.

    >>> call = alternating([lambda: 1, lambda: 2])
    >>> call(), call(), call()
    (1, 2, 1)
    """
    if len(calls) == 1:
        return calls[0]
    following = itertools.cycle(calls)
    return lambda: next(following)()
