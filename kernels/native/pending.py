"""A Python exception on its way through compiled code.

What the stable C ABI calls may not raise: it would keep the message and lose the exception. So a Python kernel that
compiled code calls leaves its exception here and returns nothing; the compiled code then calls ``_raise``, an operator
whose Python kernel raises it, by a function of torch's through which C++ exceptions pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_pending = threading.local()


def keep(error: BaseException) -> None:
    """Leave an exception for ``raise_it`` in this thread."""
    _pending.error = error


def raise_it() -> None:
    """The kernel of ``_raise``: raise the exception that is pending, and forget it."""
    error = getattr(_pending, "error", None)
    _pending.error = None
    try:
        raise error if error is not None else RuntimeError("matmul_grad: no exception is pending")
    finally:
        del error  # the frame would keep the exception, which keeps the frame


def kept(kernel: Callable[..., Any], nothing: Any = None) -> Callable[..., Any]:
    """A Python kernel for compiled code to call: ``nothing`` is its result where it raised."""

    def called_by_compiled_code(*arguments: Any, **named: Any) -> Any:
        try:
            return kernel(*arguments, **named)
        except BaseException as error:
            keep(error)
            return nothing

    return called_by_compiled_code
