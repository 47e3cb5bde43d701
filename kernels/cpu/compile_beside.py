"""A process that compiles the GEMM of a dtype while this one compiles what calls it.

Numba holds the interpreter while it compiles, so a thread would gain nothing. The object goes through the cache folder:
the lock of its file makes this process wait for it, and where the other one fails this one compiles.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys

from . import build, compile_lock, driver
from .host import usable_cores

_started: list[subprocess.Popen[bytes]] = []  # one at most


def start(dtype: str) -> None:
    """Start it, once in a process, where a second core may be used and the result can be kept and waited for."""
    if _started or not is_possible() or not driver.supports(dtype):
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    nothing = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        process = subprocess.Popen(
            [sys.executable, "-c", program(dtype)], env=environment, stdin=nothing, stdout=nothing, stderr=nothing
        )
        _started.append(process)
        atexit.register(_stop, os.getpid())


def program(dtype: str) -> str:
    """What it runs: ``main`` in this package without the module above it, whose import of torch takes a second."""
    name = __name__.split(".")[0]
    path, version = list(sys.modules[name].__path__), getattr(sys.modules[name], "__version__", "")
    return (
        f"import sys, types; top = types.ModuleType({name!r}); top.__path__, top.__version__ = {path!r}, {version!r}; "
        f"sys.modules[{name!r}] = top; from {__name__} import main; main({dtype!r})"
    )


def is_possible() -> bool:
    """Whether there is a Python to run, a core for it, and a folder with locks.

    The executable of a frozen application is the application.
    """
    runs_python = bool(sys.executable) and not getattr(sys, "frozen", False)
    return runs_python and usable_cores() > 1 and build.cache_folder() is not None and compile_lock.fcntl is not None


def _stop(owner: int) -> None:
    """Nobody waits for it any more; a forked child leaves its parent's alone."""
    if os.getpid() == owner:
        for process in _started:
            process.kill()
            process.wait()


def main(dtype: str) -> None:
    driver.gemm_address(driver.config(dtype))
