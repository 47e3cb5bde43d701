"""A process that waits on its pipe, does what one line of JSON says, and answers with another.

Between its tasks it is blocked in a read: it takes no time from whoever's turn it is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]  # a checkout's root; matmul_grad in an installation

Message = dict[str, Any]


class WorkerFailed(Exception):
    """What a worker could not do; the message is what it said."""


class WorkerExited(WorkerFailed):
    """A worker that is no more."""


class Worker:
    """``python -m module arguments``; ``ask`` gives it a task and waits for the answer."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def ask(self, task: Message, seconds: float | None = None) -> Message:
        """Its answer; WorkerExited where there is none, or none within ``seconds``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(task), file=self._process.stdin, flush=True)
            if seconds is not None and not select.select([self._process.stdout], [], [], seconds)[0]:
                self.end()
                raise WorkerExited(f"{self._name} said nothing for {seconds:.0f} s at {json.dumps(task)}")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerExited(f"{self._name} ended with status {self._process.wait()} at {json.dumps(task)}")
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"])
        return answer

    def end(self) -> None:
        """It may be in the middle of a long task."""
        self._process.kill()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.end()
        self._close()


def serve(answer: Callable[[Message], Message]) -> None:
    """Answer each task until the pipe is closed. The pipe is the first stdout; what is printed goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin:
            try:
                said = answer(json.loads(line))
            except Exception as error:
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                said = {"failed": f"{kind}{error}"}
            print(json.dumps(said), file=pipe, flush=True)


def stay_on_one_core() -> None:
    """The first core that this process may use, where a process may say so: moving costs warm caches."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
