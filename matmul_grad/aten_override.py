"""The switch: torch's matrix products on these kernels.

Only the kernels under aten's keys CPU and CUDA change. Whatever reaches them, from torch.nn, einsum, PyTorch's
backward formulas or compiled code, runs on the kernels of this package; all that lies above those keys stays torch's,
but the products of operands of 16 bits whose gradient is kept in float32.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import aten_override_kept  # noqa: F401  # defines what the compiled entries call
from .aten_override_cuda import CudaOverride, calls
from .aten_override_grouped import GroupedOverride
from .import_hooks import on_import
from .kernels.cpu.fork_safety import fork_safe_lock
from .kernels.native import state

__all__ = ["disable", "enable", "enabled", "info"]

_lock = fork_safe_lock()
_cuda = CudaOverride()
_grouped = GroupedOverride()  # of the CPU, on with the others there
_blocks: list[list[bool]] = []  # of the open enabled() blocks, in order: whether the override was on before
_notified: set[str] = set()  # reasons for which one device is not overridden


def is_on() -> bool:
    """Whether torch's products are overridden on any device.

    >>> import matmul_grad
    >>> with matmul_grad.enabled():
    ...     is_on()
    True
    """
    return state.words[state.ACTIVE] != 0 or _cuda.is_on()


def _locked(change: Callable[..., None], *arguments: Any) -> None:
    with _lock:
        change(*arguments)


_untraced = _locked  # Dynamo does not trace into it, once there is Dynamo


def _tell_dynamo(dynamo: Any) -> None:
    global _untraced
    _untraced = dynamo.disable(_locked)


on_import("torch._dynamo", _tell_dynamo)


def _set(on: bool, for_good: bool = True) -> None:
    """On or off on every device; where that fails with an error, nothing has changed.

    Off ``for_good`` removes the kernels; else those of the CPU stay where they are and call torch's.
    """
    was = is_on()
    try:
        if on:
            _install()
    except BaseException:
        if not was:
            _uninstall(for_good=True)
        raise
    if not on:
        _uninstall(for_good)


def _install() -> None:
    """Install on each device separately: one that cannot be overridden does not affect the others."""
    refused = [reason for reason in (_install_on_cpu(), _install_on_cuda()) if reason]
    if not is_on():
        raise RuntimeError(f"matmul_grad.enable(): torch's products cannot be replaced here: {refused[0]}")
    for reason in refused:
        if reason not in _notified:
            _notified.add(reason)
            warnings.warn(f"matmul_grad.enable(): on one device torch's products stay: {reason}", stacklevel=4)


def _install_on_cpu() -> str:
    """ "", or why not."""
    from .kernels.native import override_cpu, override_probe, register

    try:
        override_cpu.load()
        override_probe.require()
        override_cpu.install()
        _grouped.install()
    except register.Unavailable as reason:
        return str(reason)
    return ""


def _install_on_cuda() -> str:
    if _cuda.is_on() or not torch.cuda.is_available():
        return ""
    try:
        _cuda.install()
    except Exception as error:
        return f"CUDA: {error}"
    return ""


def _uninstall(for_good: bool) -> None:
    if _cuda.is_on():
        _cuda.uninstall()
    _grouped.uninstall(for_good)
    if state.words[state.OVERRIDE] != 0:
        from .kernels.native import override_cpu

        (override_cpu.uninstall if for_good else override_cpu.suspend)()


def enable() -> None:
    """Put these kernels under torch.mm, addmm, bmm, baddbmm, mv, addmv, dot and vdot, out and in-place forms included.

    C = A · B,  C = beta · input + alpha · (A · B)

    shapes      as torch's
    strides     any, read as they are; results lie as torch's do
    dtypes      float16, bfloat16, float32, float64 on CPU and CUDA; the rest stays torch's
    aliasing    as torch's; an ``out`` that overlaps an operand is right on CPU, where torch's may not be
    rounding    accumulated in float32 (float64 for float64); 16-bit results are rounded once, after the addition
    errors      torch's, raised by its kernels
    determinism on CPU the same bits for any m, n, batch, strides and number of threads
    source      docs/design.md, "The switch"

    For all threads of the process, and only once if called again. The first call on a build of torch tries it in a
    child process, which takes some seconds; a torch that does not pass is refused by a RuntimeError with what
    failed, and nothing has changed. CPU and CUDA are independent: a warning names the one that stays torch's. On a CPU
    torch.nn.functional.grouped_mm runs on these kernels too, of float64 and of any strides, gradients' among them.
    A gradient that a leaf keeps in float32 (``grad_dtype``) is not rounded to 16 bits: of linear layers, mm and addmm.

    >>> import torch, matmul_grad
    >>> matmul_grad.enable()
    >>> linear = torch.nn.Linear(4, 3)
    >>> linear(torch.ones(2, 4)).sum().backward()  # forward and backward, on these kernels
    >>> matmul_grad.disable()
    """
    _untraced(_set, True)


def disable() -> None:
    """Put torch's kernels back, exactly as they were.

    >>> import matmul_grad
    >>> matmul_grad.disable()
    >>> matmul_grad.info()["on"]
    []
    """
    _untraced(_set, False)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """``enable()`` for a block, then restore the previous state. A context manager and a decorator.

    Blocks nest. Where those of several threads overlap, the last one to end restores what was before the first.

    >>> import torch, matmul_grad
    >>> with matmul_grad.enabled():
    ...     torch.einsum("ij,jk->ik", torch.ones(2, 3), torch.ones(3, 2)).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    block = [False]
    try:
        _untraced(_open, block)
        yield
    finally:
        _untraced(_close, block)


def _open(block: list[bool]) -> None:
    block[0] = is_on()
    _blocks.append(block)
    _set(True)


def _close(block: list[bool]) -> None:
    """Restore the state before a block; if a later block is still open, it does so at its end."""
    place = next((place for place, other in enumerate(_blocks) if other is block), None)
    if place is None:
        return
    del _blocks[place]
    if place < len(_blocks):
        _blocks[place][0] = block[0]
    else:
        _set(block[0], for_good=False)


def info() -> dict[str, Any]:
    """State and counters of the switch: devices on which it is on, and calls while it was, by operator and dtype.

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
    devices = {"cpu": state.words[state.ACTIVE] != 0, "cuda": _cuda.is_on()}
    found: dict[str, Any] = {"on": [device for device, on in devices.items() if on]}
    for outcome, code in outcomes.items():
        counts = {name: Counter(state.calls(name, code)) + calls[name, outcome] for name in state.OPERATORS}
        counts["grouped_mm"] = calls["grouped_mm", outcome]
        found[outcome] = {name: dict(dtypes) for name, dtypes in counts.items() if dtypes}
    return found
