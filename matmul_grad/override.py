"""The switch: torch's own matrix products on these kernels.

Only the kernels under aten's CPU key change. Whatever reaches them, from torch.nn, einsum, torch's own backward
formulas or compiled code, runs on the kernels of this package; all that lies above that key stays torch's.

CUDA has its place beside CPU in ``take_over`` and ``give_back``, and nothing there yet.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from .kernels.cpu import state

__all__ = ["disable", "enable", "enabled", "info"]

_lock = threading.RLock()
_blocks: list[list[bool]] = []  # of the open enabled() blocks, in order: whether the switch was on before


def is_on() -> bool:
    """Whether the switch is on.

    >>> import matmul_grad
    >>> with matmul_grad.enabled():
    ...     is_on()
    True
    """
    return state.words[state.SWITCH] != 0


def _set(on: bool) -> None:
    if on == is_on():
        return
    from .kernels.cpu import native, switch

    if not on:
        switch.give_back()
        return
    try:
        switch.take_over()
    except native.Unavailable as reason:
        raise RuntimeError(f"matmul_grad.enable(): torch's own products cannot be replaced here: {reason}") from None


def enable() -> None:
    """Put these kernels under torch.mm, addmm, bmm and baddbmm, their out and in-place forms included.

    C = A · B,  C = beta · input + alpha · (A · B)

    shapes      as torch's
    strides     any, read as they are; results lie as torch's do
    dtypes      float16, bfloat16, float32, float64 on CPU; the rest stays torch's
    aliasing    as torch's; an ``out`` that overlaps an operand is left to torch
    rounding    accumulated in float32 (float64 for float64); 16-bit results are rounded once, after the addition
    errors      torch's own, raised by torch's own kernels
    determinism the same bits for any m, n, batch, strides and number of threads
    source      docs/design.md, "The switch"

    For all threads of the process, and only once if called again. Where torch is of a version that is not known,
    RuntimeError says so, and nothing has changed.

    >>> import torch, matmul_grad
    >>> matmul_grad.enable()
    >>> linear = torch.nn.Linear(4, 3)
    >>> linear(torch.ones(2, 4)).sum().backward()  # forward and backward, on these kernels
    >>> matmul_grad.disable()
    """
    with _lock:
        _set(True)


def disable() -> None:
    """Put torch's own kernels back, exactly as they were.

    >>> import matmul_grad
    >>> matmul_grad.disable()
    >>> matmul_grad.info()["on"]
    []
    """
    with _lock:
        _set(False)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """``enable()`` for a block, and then what was before. A context manager and a decorator.

    Blocks nest. Where those of several threads overlap, the last one to end restores what was before the first.

    >>> import torch, matmul_grad
    >>> with matmul_grad.enabled():
    ...     torch.einsum("ij,jk->ik", torch.ones(2, 3), torch.ones(3, 2)).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    block = [False]
    try:
        with _lock:
            block[0] = is_on()
            _blocks.append(block)
            _set(True)
        yield
    finally:
        with _lock:
            _close(block)


def _close(block: list[bool]) -> None:
    """Restore what was before a block, or leave that to the one that was opened after it and is still open."""
    place = next((place for place, other in enumerate(_blocks) if other is block), None)
    if place is None:
        return
    del _blocks[place]
    if place < len(_blocks):
        _blocks[place][0] = block[0]
    else:
        _set(block[0])


def info() -> dict[str, Any]:
    """What the switch has done: devices on which it is on, and calls while it was, by operator and dtype.

    ``accelerated`` counts the products of these kernels, ``handed_over`` those that they left to torch. Calls that
    fail, and those with nothing to multiply, are in neither.

    >>> import torch, matmul_grad
    >>> before = matmul_grad.info()["accelerated"].get("mm", {}).get("float64", 0)
    >>> with matmul_grad.enabled():
    ...     product = torch.ones(2, 2, dtype=torch.float64) @ torch.ones(2, 2, dtype=torch.float64)
    >>> matmul_grad.info()["accelerated"]["mm"]["float64"] - before
    1
    """
    outcomes = {"accelerated": state.ACCELERATED, "handed_over": state.HANDED_OVER}
    return {"on": ["cpu"] if is_on() else []} | {
        name: {operator: dtypes for operator in state.OPERATORS if (dtypes := state.calls(operator, outcome))}
        for name, outcome in outcomes.items()
    }


if hasattr(os, "register_at_fork"):  # a child must not find the lock taken by a thread that it has not
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
