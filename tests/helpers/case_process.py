"""Cases that need a process of their own: one child runs many, and each is reported alone.

The parent sends one case as a line of JSON and waits for its answer, so a case that crashes or hangs fails by itself
and a new child runs the rest. The child's own program calls ``serve``.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from limits import scaled


class CaseProcess:
    """A child process that answers cases, started at the first one and again after a crash or a timeout."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], limit: float) -> None:
        self.command = [sys.executable, *command]
        self.environment = dict(environment)
        self.limit = limit  # seconds a case may take, the start of the child included
        self.starts = 0
        self._count = 0
        self._before: Any = None
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    @classmethod
    def interpreted(cls, program: str) -> CaseProcess:
        """A program under Triton's interpreter; it finds these helpers."""
        paths = filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
        return cls(["-W", "error", program], environment, limit=scaled(600))

    def complaint(self, case: Any) -> str:
        """Run one case: "" where it passed, else what is wrong."""
        child = self._child if self._child is not None and self._child.poll() is None else self._start()
        assert child.stdin is not None
        self._count += 1
        before, self._before = self._before, case
        try:
            child.stdin.write(json.dumps([self._count, case]).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            return self._ended(f"ended after {before}")
        late = ""
        while True:
            line = self._read_line(child)
            if line is None:
                return self._ended(f"gave no answer in {self.limit:.0f} s")
            if not line:
                return self._ended("crashed")
            number, text = json.loads(line)
            if number == self._count:
                return text + late
            late += f"\nafter it had answered {before}: {text}"

    def close(self) -> None:
        child, self._child = self._child, None
        if child is None or self._errors is None:
            return
        self._errors.close()
        with child, contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)

    def _start(self) -> subprocess.Popen[bytes]:
        self.close()
        self.starts += 1
        self._heard = b""
        # Open as long as the child lives.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._child = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            start_new_session=True,
        )  # fmt: skip
        return self._child

    def _read_line(self, child: subprocess.Popen[bytes]) -> bytes | None:
        """The next line, nothing where the child ends first, or None when time is up."""
        assert child.stdout is not None
        pipe, end = child.stdout.fileno(), time.monotonic() + self.limit
        while b"\n" not in self._heard:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            part = os.read(pipe, 1 << 16)
            if not part:
                return b""
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _ended(self, how: str) -> str:
        """End the child and give what it left on stderr."""
        child, errors = self._child, self._errors
        assert child is not None and errors is not None
        if how == "crashed":
            child.wait()
            how = f"crashed with status {child.returncode}"
        errors.seek(0)
        report = f"the child process {how}\n{errors.read().decode(errors='replace')[-4000:]}"
        self.close()
        return report


def serve(run: Callable[[Any], None], forked: bool = False) -> None:
    """Run cases from stdin until it ends; the answer is a traceback, or "" where ``run`` raised nothing.

    With ``forked`` a fork of this process runs them, and a new fork goes on after a crash: much faster than a new
    process where imports and warm-up take seconds.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    number = mmap.mmap(-1, 8)  # of the last case that was read, for the parent of a fork that dies
    if not forked:
        _answer(run, answers, number)
        return
    gc.freeze()
    while True:
        fork = os.fork()
        if fork == 0:
            _answer(run, answers, number)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        if status == 0:
            return
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        print(json.dumps([int.from_bytes(number[:], "little"), f"the process crashed: {name}"]), file=answers)


def _answer(run: Callable[[Any], None], answers: IO[str], number: mmap.mmap) -> None:
    while line := _line_of_stdin():
        count, case = json.loads(line)
        number[:] = count.to_bytes(8, "little")
        text = complaint(run, case)
        gc.collect()  # what crashes when it is freed belongs to this case
        print(json.dumps([count, text]), file=answers)


def _line_of_stdin() -> bytes:
    """One line, unbuffered: what follows it may be another process's to read."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 1 << 16)
        if not part:
            return b""
        line += part
    return line


def assert_no_complaint(text: str, case: Any = "") -> None:
    if text:
        raise AssertionError(f"{case}\n{text}")


def complaint(run: Callable[[Any], None], case: Any) -> str:
    try:
        run(case)
    except BaseException:
        return traceback.format_exc()
    return ""
