"""Unsupported inputs fall back to PyTorch (same results, same errors); ``strict()`` makes a fallback an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

from .kernels.cpu.fork_safety import fork_safe_lock
from .kernels.native.op_table import REFUSAL

_lock = fork_safe_lock()
open_blocks = 0


def _change(by: int) -> None:
    from .kernels.native import state

    global open_blocks
    with _lock:
        open_blocks += by
        state.words[state.STRICT] = open_blocks


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Raise RuntimeError where a product would go to torch's kernel. A context manager and a decorator.

    Holds for all threads of the process, since autograd may run a backward in a thread of its own. Functions compiled
    by torch.compile are refused by dtype. A call that a tensor subclass, a tracer or a mode takes is no fallback.

    >>> import torch, matmul_grad
    >>> a = torch.ones(2, 2, dtype=torch.int64)
    >>> with matmul_grad.strict():
    ...     matmul_grad.mm(a, a)
    Traceback (most recent call last):
    RuntimeError: matmul_grad.strict(): this product goes to torch's kernel; these kernels take two dense ...
    """
    _change(1)
    try:
        yield
    finally:
        _change(-1)


def is_on() -> bool:
    """Whether any ``strict()`` block is open."""
    return open_blocks > 0


def note_fallback(self: Tensor | None, mat2: Tensor | None) -> None:
    """Called before a fallback: raises in a ``strict()`` block."""
    if is_on():
        raise RuntimeError(REFUSAL)
