"""A function that is called once in a process, in a thread of its own, whatever interrupts those who wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .fork_safety import fork_safe_lock

T = TypeVar("T")
FIRST_STEP, LONGEST_STEP = 0.0005, 0.02  # seconds between two looks at whether it is done

# One call at a time, and none during a fork: a child would lack the thread, and keep the locks of Numba and LLVM taken.
_running = fork_safe_lock()
_local = threading.local()  # is_running: in a thread that makes such a call, where a nested one is made in place


class Once(Generic[T]):
    """The result of ``function``.

    Signal handlers run in the main thread alone. They may raise anything, anywhere, also inside LLVM's binding, whose
    memory they then leave in disorder. So the work is done in a thread where they never run. A caller that is
    interrupted leaves it at work, and the next one waits for the same result.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function: Callable[[], T] | None = function
        self._value: Any = None
        self._failure = ""
        self._done = False
        self._thread: threading.Thread | None = None

    def result(self) -> T:
        """What the function returned; RuntimeError, at every call, where it raised. It is not called again.

        Raises whatever interrupts the caller, too.
        """
        if not self._done and getattr(_local, "is_running", False):
            self._run()
        step = FIRST_STEP
        while not self._done:
            if self._thread is None or not self._thread.is_alive():
                self._start()
            time.sleep(step)
            step = min(2 * step, LONGEST_STEP)
        if self._failure:
            raise RuntimeError(self._failure)
        return self._value

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="matmul_grad")
        try:
            self._thread.start()
        except RuntimeError:  # no more threads, or the interpreter is ending
            self._run()
        except KeyError as error:  # a handler raised in start(), whose clean-up then fails since the thread is running
            raise error.__context__ or error from None

    def _run(self) -> None:
        with _running:
            if self._done or self._function is None:
                return
            was, _local.is_running = getattr(_local, "is_running", False), True
            try:
                self._value = self._function()
            except BaseException as error:  # its text alone is kept: its traceback would keep every caller's frames
                self._failure = str(error) or type(error).__name__
            finally:
                _local.is_running = was
            self._function = None
            self._done = True
