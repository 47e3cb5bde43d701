"""Child processes with a time limit: started, fed and ended, with all that they started.

A `Worker` waits on its pipe, does the task in one line of JSON, and answers with another. Between its tasks it is
blocked in a read: it takes no time from the process that is timed meanwhile. `run` follows a command that only prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import matmul_grad

TAIL = 2000  # characters of stderr that are kept of a process that failed
CLOSING = 10.0  # seconds that a process has to end by itself when its pipes are closed

Message = dict[str, Any]


class WorkerFailed(Exception):
    """What a worker could not do; the message is its own."""


class WorkerExited(WorkerFailed):
    """A worker that is no more; ``stderr`` is the end of what it wrote there."""

    def __init__(self, message: str, stderr: str = "") -> None:
        super().__init__(message)
        self.stderr = stderr


class ExitStatus(NamedTuple):
    """How a process ended: its status, or None where it was ended, and the end of its stderr."""

    status: int | None
    stderr: str

    @property
    def reason(self) -> str:
        """One line.

        >>> ExitStatus(1, "Traceback\\nValueError: no").reason, ExitStatus(-11, "").reason
        ('status 1: ValueError: no', 'killed by SIGSEGV')
        """
        if self.status is None:
            return "its time was up"
        if self.status < 0:
            with contextlib.suppress(ValueError):
                return f"killed by {signal.Signals(-self.status).name}"
        last = self.stderr.strip().splitlines()[-1:] or ["nothing on stderr"]
        return f"status {self.status}: {last[0][:300]}"


class Child:
    """A process in a group of its own; whatever way the block ends, it and all that it started are gone then."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | paths() | dict(environment or {}),
            cwd=folder,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in self._process.stdout:
                self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def line(self, seconds: float | None) -> str | None:
        """The next line of stdout, None where there is no more; TimeoutError where none comes within ``seconds``."""
        try:
            return self._lines.get(timeout=None if seconds is None else max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None

    def wait(self, seconds: float) -> ExitStatus:
        """How it ended by itself, within ``seconds``."""
        try:
            status: int | None = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - TAIL))
        return ExitStatus(status, self._errors.read().decode(errors="replace"))

    def close(self) -> None:
        """Let it end by itself, since a tool around it has a summary to write; then all that is left is killed."""
        if self._errors.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self.wait(CLOSING)
        self.end()

    def end(self) -> None:
        """Kill the process group: a child of the child would keep the GPU. Once: its number may be another's then."""
        if self._errors.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(CLOSING)
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: Any) -> None:
        self.end()


def run(
    command: Sequence[str],
    heard: Callable[[str], None],
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> ExitStatus:
    """Run a command for ``seconds`` at most; ``heard`` gets each line of stdout."""
    deadline = monotonic() + seconds
    with Child(command, environment, folder) as child:
        try:
            while (line := child.line(deadline - monotonic())) is not None:
                heard(line)
        except TimeoutError:
            return child.wait(0.0)._replace(status=None)
        return child.wait(max(0.0, deadline - monotonic()) + CLOSING)


class Worker:
    """``python -m module arguments``; ``ask`` gives it a task and waits for the answer. ``wrapper`` is a command that
    it runs under."""

    def __init__(
        self, module: str, *arguments: str, environment: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> None:
        self._name = module
        self._child = Child([*wrapper, *python("-m", module, *arguments)], environment)

    def ask(self, task: Message, seconds: float | None = None) -> Message:
        """Its answer; WorkerExited where there is none, or none within ``seconds``."""
        try:
            self._child.send(json.dumps(task))
            answer = self._answer(seconds)
        except TimeoutError:
            self.end()
            raise WorkerExited(f"{self._name}: no answer for {seconds:.0f} s at {json.dumps(task)}") from None
        except BrokenPipeError:
            answer = None
        if answer is None:
            ended = self._child.wait(CLOSING)
            self.end()
            raise WorkerExited(f"{self._name}: {ended.reason}, at {json.dumps(task)}", ended.stderr)
        return answer

    def _answer(self, seconds: float | None) -> Message | None:
        """The next line that is JSON: a command around it may print too."""
        while (line := self._child.line(seconds)) is not None:
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    return answer
        return None

    def end(self) -> None:
        """It may be in the middle of a long task."""
        self._child.end()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self._child.close() if kind is None else self._child.end()


def serve(answer: Callable[[Message], Message]) -> None:
    """Answer each task until the pipe is closed. The pipe is the first stdout; what is printed goes to stderr."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            try:
                said = answer(json.loads(line))
            except Exception as error:
                said = reason_of(error)
            print(json.dumps(said), file=pipe, flush=True)


def reason_of(error: BaseException) -> Message:
    """What takes the place of an answer; the message of an AssertionError is enough by itself."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return {"failed": first if isinstance(error, AssertionError) else f"{type(error).__name__}: {first}"}


def paths() -> dict[str, str]:
    """So that a child finds this package where its parent did, installed or not, whatever folder it runs in."""
    home = Path(matmul_grad.__file__).parents[1]
    if "site-packages" in home.parts:
        return {}
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(home), known]))}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
