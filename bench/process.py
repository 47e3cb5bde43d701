"""A command in a process group of its own, read line by line, ended when it takes too long or falls silent."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, time
from typing import IO, NamedTuple, Protocol

import matmul_grad

TAIL = 2000  # characters of stderr that are kept of a process that failed


class ExitStatus(NamedTuple):
    """How a process ended: its status, or None where it was ended, and what it said last on stderr."""

    status: int | None
    said: str

    @property
    def reason(self) -> str:
        """One line.

        >>> ExitStatus(1, "Traceback\\nValueError: no").reason, ExitStatus(-11, "").reason
        ('status 1: ValueError: no', 'killed by SIGSEGV')
        """
        if self.status is not None and self.status < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-self.status).name}"
        last = self.said.strip().splitlines()[-1:] or ["nothing on stderr"]
        return f"status {self.status}: {last[0][:300]}" if self.status is not None else "its time was up"


class Run(Protocol):
    """``run``, or what tests put in its place."""

    def __call__(
        self,
        command: Sequence[str],
        heard: Callable[[str], None],
        *,
        seconds: float,
        silence: float = ...,
        environment: Mapping[str, str] = ...,
        folder: Path | None = ...,
    ) -> ExitStatus: ...


def run(
    command: Sequence[str],
    heard: Callable[[str], None],
    *,
    seconds: float,
    silence: float = float("inf"),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> ExitStatus:
    """Run it for ``seconds`` at most, and for ``silence`` at most without a line; ``heard`` gets each line of stdout.

    Whatever way this ends, the process and all that it started are gone then.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | paths() | dict(environment or {}),
            cwd=folder,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        try:
            status = listen(process, heard, seconds, silence)
        finally:
            end(process)
        return ExitStatus(status, tail(errors))


def listen(process: subprocess.Popen[str], heard: Callable[[str], None], seconds: float, silence: float) -> int | None:
    """Hand over the lines until the process ends; None where it has to be ended."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read, args=(process, lines), daemon=True).start()
    deadline = monotonic() + seconds
    while True:
        left = min(deadline - monotonic(), silence)
        try:
            line = lines.get(timeout=max(0.0, left))
        except queue.Empty:
            return None
        if line is None:
            break
        heard(line.rstrip("\n"))
    try:
        return process.wait(max(0.0, deadline - monotonic()) + 5)
    except subprocess.TimeoutExpired:
        return None


def read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def end(process: subprocess.Popen[str]) -> None:
    """Kill the process group: a child of the child would keep the GPU."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def tail(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - TAIL))
    return errors.read().decode(errors="replace")


def paths() -> dict[str, str]:
    """So that a child finds this package where its parent did, installed or not, whatever folder it runs in."""
    home = Path(matmul_grad.__file__).parents[1]
    if "site-packages" in home.parts:
        return {}
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(home), known]))}


def deadline(seconds: float) -> float:
    """When a child that has so many seconds should stop by itself, on the clock of the machine; its start counts."""
    return time() + 0.95 * seconds - 2


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
