"""What a call takes in memory on a CPU: its peak above what was there before, in a process that has made no such call.

A process that has multiplied holds memory which was freed, or is kept as a workspace, and the next call uses it again:
nothing grows. So the process `PROCESS` multiplies nothing: it forks a child for each call. None of its threads is
missing in the child, since it has never started one of torch's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace

import torch

from .. import ops
from ..kernels.cpu import driver
from . import backends, inputs, worker
from .devices import reset_peak, status
from .workloads import LAYOUTS, OURS, Workload

PROCESS = "memory"
WARM = 8  # the size of the call before, which loads what any call needs


def is_measured(workload: Workload) -> bool:
    """Small operands take next to nothing; one layout shows what the others take, and a call of the operator what the
    public function takes."""
    large = workload.device == "cpu" and workload.held > inputs.IN_L1
    return large and workload.layout == LAYOUTS[0] and not workload.mode


def of_call(name: str, workload: Workload) -> worker.Message:
    """{"peak bytes": …}; nothing of it where the system has no fork, or does not tell the peak."""
    if not hasattr(os, "fork") or not reset_peak():
        return {}
    dtype = str(workload.torch_dtype).removeprefix("torch.")
    if name == OURS and not ops.native_status() and driver.supports(dtype):
        driver.gemm_address(driver.config(dtype))  # compiled or loaded here, once for all children
    try:
        return forked(lambda: {"peak bytes": _peak(name, workload)})
    except AssertionError as reason:
        return {"failed": str(reason)}


def forked(measure: Callable[[], worker.Message]) -> worker.Message:
    """What a child measures; AssertionError where it ends without an answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            driver.workspace[0] = 0  # not a child whose parent had threads: all of them can be used
            found = measure()
        except BaseException as reason:
            found = worker.reason_of(reason)
        os.write(writer, json.dumps(found).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not answer:
        raise AssertionError(f"its memory was measured in a child that ended with status {ended}")
    found = json.loads(answer)
    if "failed" in found:
        raise AssertionError(found["failed"])
    return dict(found)


def _peak(name: str, workload: Workload) -> int:
    torch.set_num_threads(workload.threads)
    library = backends.BY_NAME[name].library()
    for each in (replace(workload, m=WARM, n=WARM, k=WARM), workload):
        call = backends.call_of(library, each, inputs.draw(each, "ones"))
        reset_peak()
        before = status("VmRSS")
        result = call()
        peak = status("VmHWM") - before
        del result
    return max(0, peak)
