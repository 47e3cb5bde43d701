"""Compile every CPU kernel before it is needed, on all cores; load those that are in the cache."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter

from . import machine, ops
from .cli_common import UsageError

__all__ = ["compiled", "steps"]

MODULE = "matmul_grad.warmup"
ROOT = Path(__file__).parents[1]  # where this package is found
SPACE = 4 << 20  # bytes: several times what all kernels take


class NotCompiled(RuntimeError):
    """A CPU kernel that does not compile here; the message is one line with the reason."""


def steps() -> list[tuple[str, Callable[[], object]]]:
    """What there is to compile: a name and the call that does it, each for itself.

    >>> names = [name for name, compile_kernel in steps()]
    >>> names[0], len(names) > 1
    ('operator', True)
    """
    from .kernels.cpu import driver

    def gemm(dtype: str) -> tuple[str, Callable[[], object]]:
        block = driver.config(dtype)
        return block.name, lambda: driver.load_all(block)

    return [("operator", ops.gradients_status), ("out", ops.outs_status), *map(gemm, machine.cpu_dtypes())]


def compiled() -> Iterator[tuple[str, float]]:
    """Every kernel compiled or loaded, one after the other, with the seconds that it took.

    Where the first had to be compiled the others have to be too: processes on the other cores then fill the cache, and
    this one loads what they have compiled, or compiles what they could not. Raises NotCompiled.

    >>> [name for name, seconds in compiled()][0]
    'operator'
    """
    waiting = [name for name, _ in steps()]
    helpers: dict[str, subprocess.Popen[bytes]] = {}
    with contextlib.ExitStack() as stack:
        for name, compile_one in steps():
            waiting.remove(name)
            before, start = len(machine.cached_kernels()), perf_counter()
            if name in helpers:
                helpers[name].wait()
            try:
                compile_one()
            except Exception as error:
                reason = (str(error) or "no reason given").splitlines()[0]
                raise NotCompiled(f"{name} cannot be compiled: {type(error).__name__}: {reason}") from error
            yield name, perf_counter() - start
            if not helpers and len(machine.cached_kernels()) > before:
                helpers = start_helpers(waiting, machine.usable_cores() - 1, stack)


def start_helpers(names: Sequence[str], count: int, stack: contextlib.ExitStack) -> dict[str, subprocess.Popen[bytes]]:
    """The process that compiles each of ``names``; this process keeps a share of its own."""
    helpers: dict[str, subprocess.Popen[bytes]] = {}
    for i in range(1, 1 + min(count, len(names) - 1)):
        share = names[i :: count + 1]
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, *share],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        helpers |= dict.fromkeys(share, process)
    return helpers


def require_cache() -> None:
    """UsageError where compiled kernels cannot be kept: then compiling them now would save nothing later."""
    folder = machine.cache_folder()
    if folder is None:
        raise UsageError(
            "compiled kernels cannot be kept: the user has no home folder, and MATMUL_GRAD_CACHE is not set"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(SPACE))
    except OSError as reason:
        raise UsageError(f"compiled kernels cannot be kept in {folder}: {reason.strerror}") from reason


def main(names: Sequence[str]) -> None:
    """Compile those of the steps that are named."""
    for name, compile_one in steps():
        if name in names:
            compile_one()


if __name__ == "__main__":
    main(sys.argv[1:])
