"""What the commands share at their edges: exit codes, errors in one line, output that ends early, a terminal."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

EXIT_MISMATCH, EXIT_USAGE, EXIT_INTERRUPTED, CLOSED = 1, 2, 130, 141
OUTPUT_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EBADF)
MOST_THREADS = 1024  # torch takes any C int, and the process ends where the system cannot start so many


class UsageError(Exception):
    """The command cannot be done here; the message is one line with the reason."""


class Parser(argparse.ArgumentParser):
    """Reports what it cannot take in one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: {message}")
        raise SystemExit(EXIT_USAGE)


def run_command(program: str, command: Callable[[], int]) -> int:
    """The exit code of a command; whatever ends it early ends it in one line.

    The output is flushed here: an error of the last write, to a closed pipe or a full disk, would otherwise appear as a
    traceback when the interpreter exits. A reader that closes the pipe, as `head` does, is no error worth a line.

    >>> run_command("example", lambda: 0)
    0
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except UsageError as reason:
        complain(f"{program}: {reason}")
        return EXIT_USAGE
    except KeyboardInterrupt:
        complain(f"{program}: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return CLOSED
    except OSError as reason:
        if reason.filename is not None or reason.errno not in OUTPUT_ERRORS:
            raise
        discard_output()
        complain(f"{program}: the output cannot be written: {reason.strerror}")
        return EXIT_USAGE


def complain(line: str) -> None:
    """One line on stderr, if that can be written at all."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """What stdout still holds goes nowhere, so that the interpreter's own flush at exit succeeds."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def thread_count(text: str) -> int:
    """An argument: how many threads.

    >>> thread_count("2")
    2
    """
    value = int(text)
    if not 1 <= value <= MOST_THREADS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MOST_THREADS}, got {value}")
    return value


def require_isa() -> None:
    """UsageError where $MATMUL_GRAD_ISA names an instruction set that this CPU does not have."""
    from .kernels.cpu import host

    try:
        host.cpu()
    except (ValueError, RuntimeError) as reason:
        raise UsageError(str(reason)) from reason


def require_cuda(what: str) -> None:
    """UsageError where torch finds no GPU, which ``what`` needs."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"{what}: torch {torch.__version__} finds no CUDA device here")


def require(*modules: str, **packages: str) -> None:
    """UsageError where one of the modules is not installed; ``packages`` are modules whose package has another name.

    >>> require("argparse")
    >>> require("argparse", sklearn_of_nowhere="scikit-learn")
    Traceback (most recent call last):
    matmul_grad.cli_common.UsageError: scikit-learn is missing: pip install scikit-learn
    """
    wanted = {module: module for module in modules} | packages
    missing = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(f"{', '.join(missing)} {verb} missing: pip install {' '.join(missing)}")


def terminal() -> Console | None:
    """stderr, where it is a terminal and rich is installed: a machine with a GPU may have torch and little else."""
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False, emoji=False)
    return console if console.is_terminal else None
