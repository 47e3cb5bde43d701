"""Settings of the GPU kernels: batch invariance, and how float32 is multiplied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .kernels.cpu.fork_safety import fork_safe_lock
from .kernels.gpu import settings as gpu_settings
from .kernels.native import launch_table as table

FLOAT32 = ("ieee", "tf32x3")

_lock = fork_safe_lock()
_invariant = 0


@contextlib.contextmanager
def deterministic(*, batch_invariant: bool = False) -> Iterator[None]:
    """The same bits from run to run; with ``batch_invariant``, a row of a product has the same bits for any m.

    The kernels are deterministic without it: no atomics, and tiles are chosen without timing. On CPU a row's bits
    never depend on m either. On a GPU they do unless ``batch_invariant``: then k is never cut into parts and a
    vector is multiplied as a matrix is, forward and backward. Weight gradients sum over m, so theirs depend on it.
    A context manager and a decorator; holds for all threads of the process, since autograd may run a backward in a
    thread of its own.

    >>> import torch, matmul_grad
    >>> a, b = torch.randn(5, 300), torch.randn(300, 4)
    >>> with matmul_grad.deterministic(batch_invariant=True):
    ...     torch.equal(matmul_grad.mm(a, b)[:2], matmul_grad.mm(a[:2], b))
    True
    """
    _change(int(batch_invariant))
    try:
        yield
    finally:
        _change(-int(batch_invariant))


def _change(by: int) -> None:
    global _invariant
    with _lock:
        _invariant += by
        gpu_settings.invariant = _invariant > 0
        table.words[table.MODE] = gpu_settings.invariant


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """How a GPU multiplies float32 where torch asks for its full precision ("highest").

    "ieee": fused multiply-adds, as torch. "tf32x3": on the matrix units, each operand in two TF32 halves, three
    products of four: an error near float32's own, no subnormals of the lower half. Where torch's setting allows TF32,
    that is used, as in torch. On CPU float32 is always IEEE. Holds for all threads. ValueError for another name.

    >>> import torch, matmul_grad
    >>> with matmul_grad.float32_products("tf32x3"):
    ...     matmul_grad.mm(torch.ones(1, 2), torch.ones(2, 1))
    tensor([[2.]])
    """
    if precision not in FLOAT32:
        raise ValueError(f"precision must be one of {', '.join(FLOAT32)}, got {precision!r}")
    before = gpu_settings.float32
    gpu_settings.float32 = precision
    try:
        yield
    finally:
        gpu_settings.float32 = before
