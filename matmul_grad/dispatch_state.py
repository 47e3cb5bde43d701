"""Whether torch's dispatcher has anything to do between a call of an operator and its kernel under Autograd.

It has under modes, transforms, tracers, autocast and profilers, and for subclasses. Where it has not, a function in
Python calls the kernel in Python itself, which saves the way into the dispatcher and back.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from .kernels.native.torch_layout import PYTHON_MANGLED, address

_PLAIN = frozenset((Tensor, Parameter))
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_at = address(PYTHON_MANGLED["matmul_grad_has_callbacks"])
_has_callbacks = ctypes.PYFUNCTYPE(ctypes.c_bool)(_at) if _at else None


def _keys() -> tuple[int, int]:
    """What this thread adds to the dispatch keys of tensors, and what it leaves out."""
    return _included().raw_repr(), _excluded().raw_repr()


def _idle_keys() -> frozenset[tuple[int, int]]:
    """Those of a thread that nothing was done to, and in inference mode."""
    found = []

    def read() -> None:
        found.append(_keys())
        with torch.inference_mode():
            found.append(_keys())

    thread = threading.Thread(target=read)
    try:
        thread.start()
    except RuntimeError:  # no more threads: calls go through the dispatcher
        return frozenset()
    thread.join()
    return frozenset(found)


_IDLE = _idle_keys()


def is_idle(one: Tensor, other: Tensor, third: Tensor | None = None) -> bool:
    """Whether a call of these operands would go straight to the kernel under Autograd, and from there to that below.

    Not of negative views and zeros without memory, which are made plain in between.
    """
    if is_dynamo_compiling() or _keys() not in _IDLE:
        return False
    for x in (one, other) if third is None else (one, other, third):
        if type(x) not in _PLAIN or x.is_neg() or x._is_zerotensor():
            return False
    return _has_callbacks is not None and not _has_callbacks()


def is_plain(*tensors: Tensor) -> bool:
    """Whether their memory holds their elements, and nobody follows what is done with them.

    No negative view and no tensor of zeros without memory; no graph, tangent, transform, Python mode or subclass.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(x) is Tensor and not x.is_neg() and not x._is_zerotensor() for x in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
    )
