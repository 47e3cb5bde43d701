"""The switch: torch's own matrix products on these kernels.

Only the kernels under aten's keys CPU and CUDA change. Whatever reaches them, from torch.nn, einsum, torch's own
backward formulas or compiled code, runs on the kernels of this package; all that lies above those keys stays torch's.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from .kernels.cpu.fork_safety import fork_safe_lock
from .kernels.native import state
from .override_cuda import Switch, calls

__all__ = ["disable", "enable", "enabled", "info"]

_lock = fork_safe_lock()
_cuda = Switch()
_blocks: list[list[bool]] = []  # of the open enabled() blocks, in order: whether the switch was on before


def is_on() -> bool:
    """Whether the switch is on.

    >>> import matmul_grad
    >>> with matmul_grad.enabled():
    ...     is_on()
    True
    """
    return state.words[state.OVERRIDE] != 0


def _set(on: bool) -> None:
    """On or off everywhere; where an error says that it cannot be on, it is as it was."""
    was = is_on()
    try:
        if on:
            _take_over()
    except BaseException:
        if not was:
            _give_back()
        raise
    if not on:
        _give_back()


def _take_over() -> None:
    from .kernels.native import override_cpu, register

    try:
        if not is_on():
            override_cpu.install()
    except register.Unavailable as reason:
        raise RuntimeError(f"matmul_grad.enable(): torch's own products cannot be replaced here: {reason}") from None
    if not _cuda.is_on() and torch.cuda.is_available():
        _cuda.take_over()


def _give_back() -> None:
    if _cuda.is_on():
        _cuda.give_back()
    if is_on():
        from .kernels.native import override_cpu

        override_cpu.uninstall()


def enable() -> None:
    """Put these kernels under torch.mm, addmm, bmm and baddbmm, their out and in-place forms included.

    C = A · B,  C = beta · input + alpha · (A · B)

    shapes      as torch's
    strides     any, read as they are; results lie as torch's do
    dtypes      float16, bfloat16, float32, float64 on CPU and CUDA; the rest stays torch's
    aliasing    as torch's; an ``out`` that overlaps an operand is left to torch
    rounding    accumulated in float32 (float64 for float64); 16-bit results are rounded once, after the addition, on
                a GPU before it and after it
    errors      torch's own, raised by torch's own kernels
    determinism on CPU the same bits for any m, n, batch, strides and number of threads
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
    devices = {"cpu": is_on(), "cuda": _cuda.is_on()}
    found: dict[str, Any] = {"on": [device for device, on in devices.items() if on]}
    for outcome, code in outcomes.items():
        sums = {name: Counter(state.calls(name, code)) + calls[name, outcome] for name in state.OPERATORS}
        found[outcome] = {name: dict(dtypes) for name, dtypes in sums.items() if dtypes}
    return found
