"""Code that needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from limits import scaled

LIMIT = scaled(900)  # seconds that a process may take; a hang takes longer
IMPORTS = "import os, sys, time, torch, matmul_grad\n"
OPERANDS = "from matmul_grad.testing import *\n"
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks")


def assert_runs(
    code: str, *options: str, arguments: tuple[str, ...] = (), quiet: bool = True, **environment: str
) -> str:
    """A fresh interpreter runs ``code`` and exits with 0, with nothing on stderr if ``quiet``; returns its output."""
    command = [sys.executable, *options, "-c", IMPORTS + textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    assert done.stderr == "" or not quiet
    return done.stdout


def assert_computes(code: str, **environment: str) -> str:
    """``assert_runs`` with the names of ``matmul_grad.testing``, and with a message about compiling allowed."""
    return assert_runs(OPERANDS + textwrap.dedent(code), quiet=False, **environment)
