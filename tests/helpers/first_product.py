"""Programs that interrupt, or fork while, the first product of a dtype loads its kernels."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

import processes
from limits import scaled

if TYPE_CHECKING:
    import subprocess

LIMIT = round(scaled(280))  # seconds that a child or a handler may take; what hangs takes longer

PRELUDE = """
import os, signal, sys, threading, time, torch, matmul_grad
from matmul_grad import ops
from matmul_grad.testing import *
from matmul_grad.kernels.cpu import build, driver

real_load, loads = build.load, []
build.SLOW = 1e6  # what it prints has tests of its own

def load_with(action):
    '''From now on the first load of a set of kernels is preceded by ``action``.'''
    waiting = [action]
    def load(key, name, *rest):
        loads.append(name)
        if waiting:
            waiting.pop()()
        return real_load(key, name, *rest)
    build.load = load

class Late(Exception): pass
class Stop(BaseException): pass

def check_interrupted(call, error):
    '''``call`` is interrupted by ``error`` while it loads kernels, and computes the product afterwards.'''
    handled = threading.Event()
    def handler(*_):
        handled.set()
        raise error("interrupted")
    def interrupt():
        os.kill(os.getpid(), signal.SIGUSR1)
        handled.wait(LIMIT)
    signal.signal(signal.SIGUSR1, handler)
    before = len(loads)
    load_with(interrupt)
    try:
        call()
    except error as found:
        assert type(found) is error and str(found) == "interrupted", repr(found)
    else:
        raise AssertionError(f"{error.__name__} did not arrive")
    assert len(loads) > before, "nothing was loaded, so nothing was interrupted"
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with matmul_grad.strict():
        return call()
"""


def run(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return processes.run(f"LIMIT = {LIMIT}\n" + PRELUDE + textwrap.dedent(code), *options, **environment)


def assert_runs(code: str, **environment: str) -> str:
    """A fresh interpreter runs ``code``, ends well and prints no error; what it printed."""
    done = run(code, **environment)
    # CPython's own race: where a handler raises within Thread.start, the new thread ends with this message.
    noise = r"Exception ignored in thread started by.*?KeyError: <Thread\(matmul_grad[^\n]*\n"
    stderr = re.sub(noise, "", done.stderr, flags=re.DOTALL)
    assert (done.returncode, stderr) == (0, ""), f"{done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout
