"""Code that needs a process of its own, without paying for the import of torch each time.

On Linux a server that has imported torch, and nothing of this package, forks for each call: the code runs in a process
in which nothing has happened but that import, and which ends as a Python program does, exit handlers included.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from limits import scaled

LIMIT = scaled(900)  # seconds that a process may take; a hang takes longer
IMPORTS = "import os, sys, time, torch, matmul_grad\n"
OPERANDS = "from matmul_grad.testing import *\n"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks")

# Variables that nothing reads while torch is imported. Where others differ, the process is a new one.
READ_LATER = ("MATMUL_GRAD_", "NUMBA_", "XDG_CACHE_HOME", "HOME", "PYTEST_CURRENT_TEST")
SERVER = """
import gc, json, os, sys, warnings
import torch

gc.freeze()  # a fork that ends need not look through what the import made

def next_case():
    while line := sys.stdin.readline():
        case = json.loads(line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about threads of libraries, which are idle
            fork = os.fork()
        if fork == 0:
            return case
        print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
    sys.exit()

case = next_case()
for stream, path in enumerate(case["streams"]):
    opened = os.open(path, os.O_RDWR)
    os.dup2(opened, stream)
    os.close(opened)
os.environ.clear()
os.environ.update(case["environment"])
os.chdir(case["folder"])
sys.argv[1:] = case["arguments"]
program = compile(case["code"], "<string>", "exec")
for name in ("gc", "json", "os", "sys", "torch", "warnings", "next_case", "stream", "path", "opened", "case", "name"):
    del globals()[name]
exec(globals().pop("program"))
"""


class Server:
    """Forks for each call; the forks of a call that hangs end with it."""

    def __init__(self, options: tuple[str, ...]) -> None:
        self.environment = dict(os.environ)
        command = [sys.executable, *options, "-c", SERVER]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        atexit.register(self.close)

    def is_usable(self, environment: dict[str, str]) -> bool:
        """Whether it is alive and its forks can have this environment."""
        differing = {name for name, _ in self.environment.items() ^ environment.items()}
        return self.process.poll() is None and all(name.startswith(READ_LATER) for name in differing)

    def run(
        self, code: str, arguments: tuple[str, ...], environment: dict[str, str], folder: Path
    ) -> tuple[int, str, str]:
        """Exit status, output and errors."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as errors:
            case = {
                "code": code, "arguments": arguments, "environment": environment, "folder": str(folder),
                "streams": [os.devnull, out.name, errors.name],
            }  # fmt: skip
            try:
                self.process.stdin.write(json.dumps(case).encode() + b"\n")
                ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
                status = self.process.stdout.readline() if ready else b""
            except BaseException:
                self.close()  # or the next call would read the answer to this one
                raise
            if not status:
                self.close()
            text = out.read().decode(), errors.read().decode(errors="replace")
        assert status, f"no end after {LIMIT:.0f} s, or the server is gone\n{text[0]}\n{text[1]}"
        return int(status), *text

    def close(self) -> None:
        atexit.unregister(self.close)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


_servers: dict[tuple[str, ...], Server] = {}


def run(
    code: str, *options: str, arguments: tuple[str, ...] = (), folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What ``python OPTIONS -c CODE ARGUMENTS`` prints and how it ends; torch may have been imported before."""
    given = os.environ | environment
    command = [sys.executable, *options, "-c", code, *arguments]
    if not sys.platform.startswith("linux"):
        return subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    server = _servers.get(options)
    if server is None or not server.is_usable(dict(os.environ)):
        # Or a library has set a variable since: one new server for it, instead of a new process for each later call.
        if server is not None:
            server.close()
        server = _servers[options] = Server(options)
    if not server.is_usable(given):
        return subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    return subprocess.CompletedProcess(command, *server.run(code, arguments, given, folder or Path.cwd()))


def assert_runs(
    code: str, *options: str, arguments: tuple[str, ...] = (), quiet: bool = True, **environment: str
) -> str:
    """``code`` exits with 0, with nothing on stderr if ``quiet``; returns its output.

    Where kernels are not in the cache yet, it may print that they are compiled.
    """
    done = run(IMPORTS + textwrap.dedent(code), *options, arguments=arguments, **environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    errors = [line for line in done.stderr.splitlines() if "compiling CPU kernels" not in line]
    assert not errors or not quiet, "\n".join(errors)
    return done.stdout


def assert_computes(code: str, **environment: str) -> str:
    """``assert_runs`` with the names of ``matmul_grad.testing``, and with a message about compiling allowed."""
    return assert_runs(OPERANDS + textwrap.dedent(code), quiet=False, **environment)
