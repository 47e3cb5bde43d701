"""The process of some backends: it makes their products ready, checks them, and times them when it is asked.

{"prepare": {workload}, "names": [...]}     → {"copies": n, "backends": {name: {...}}}
{"time": name, "clock": "call"}         → {"seconds": a call, "share": of a core}
{"bandwidth": true}                     → GB/s of memory
{"facts": true}                         → what it runs on
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

import matmul_grad

from . import backends, baseline, correctness, inputs, roofline, timer, worker
from .backends import PEAK, TORCH_PROCESS, Call, Library
from .calls import batch_of, call_of, products_of
from .devices import MOST_CALLS, REPLAY, Cpu, Gpu, cores, status
from .roofline import Device
from .workloads import Workload

CALL, DEVICE = "call", "device"


class SelfComparison(AssertionError):
    """A backend that does not do by itself what its name says."""


@dataclass
class Prepared:
    """A backend with its calls for the workload at hand, one for each copy of the operands."""

    calls: list[Call]
    call: Call
    batches: dict[str, timer.Batch] = field(default_factory=dict)


class BackendSession:
    """Answers the runner's tasks with the libraries of this process."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._libraries: dict[str, Library] = {}
        self._ready: dict[str, Prepared] = {}

    def answer(self, task: worker.Message) -> worker.Message:
        if "prepare" in task:
            return self.prepare(Workload(**task["prepare"]), task["names"])
        if "time" in task:
            share = timer.share_of_core()
            seconds = self._ready[task["time"]].batches[task["clock"]]()
            return {"seconds": seconds, "share": share()}
        if "bandwidth" in task:
            return roofline.bandwidth(self._device)
        return {"facts": self._device.facts()}

    def prepare(self, workload: Workload, names: Sequence[str]) -> worker.Message:
        """Each backend right, or why it is not, in which case it is not timed."""
        self._ready.clear()
        self._device.tidy()
        free = self._device.free_bytes()
        if 4 * workload.held > free:
            return {"skipped": f"needs {4 * workload.held / 2**30:.1f} GiB of free memory"}
        whole = inputs.draw(workload, "integers", self._device.device)
        answers: dict[str, Any] = {}
        for name in names:
            if name != PEAK:
                answers[name] = self._try(name, workload, whole)
        beyond = status("VmHWM") - workload.held - workload.given
        del whole
        normal = inputs.draw(workload, "normal", self._device.device)
        try:
            inputs.assert_normal(normal)
        except inputs.Unfit as reason:
            return {"unfit": str(reason)}
        count = inputs.copies_past(self._device.cache_bytes(), workload.held, free)
        sets = list(inputs.copies(normal, count))
        for name in names:
            if name == PEAK:
                self._raise_peak(workload, answers)
            elif "first" in answers[name]:
                answers[name] |= self._attempt(name, lambda name=name: self._make_ready(name, workload, sets))
        beyond = max(beyond, status("VmHWM") - count * workload.held - workload.given)
        return {"copies": count, "backends": answers, "beyond": beyond}

    def _attempt(self, name: str, do: Any) -> dict[str, Any]:
        """What it gives, or in place of that what was wrong; an error takes no other backend with it."""
        try:
            with matmul_grad.strict() if name == baseline.OURS else nullcontext():
                return do()
        except backends.Skipped as reason:
            return {"skipped": str(reason)}
        except AssertionError as reason:
            return {"wrong": str(reason)}
        except Exception as reason:
            return {"failed": f"{type(reason).__name__}: {(str(reason).strip() or 'no message').splitlines()[0]}"}

    def _try(self, name: str, workload: Workload, whole: baseline.Operands) -> dict[str, Any]:
        """The first call, and every element of it on integers."""

        def do() -> dict[str, Any]:
            if name not in self._libraries:
                self._libraries[name] = backends.BY_NAME[name].library()
            library, before = self._libraries[name], counted()
            self._device.wait()
            start = perf_counter()
            result = call_of(library, workload, whole)()
            self._device.wait()
            first = perf_counter() - start
            if name != baseline.OURS and counted() != before:
                raise SelfComparison(f"{name} runs on the kernels of matmul_grad: it would be compared with itself")
            for which, got in products_of(library, workload, result).items():
                correctness.assert_exact(got, *whole.of(which), f"{name}, {workload.name}, {which}")
            return {"first": timer.rounded(first)}

        return self._attempt(name, do)

    def _make_ready(self, name: str, workload: Workload, sets: Sequence[baseline.Operands]) -> dict[str, Any]:
        """Judged on the operands that it is timed on."""
        library = self._libraries[name]
        calls = [call_of(library, workload, each) for each in sets]
        found = products_of(library, workload, calls[0]())
        for which, got in found.items():
            correctness.assert_close(got, *sets[0].of(which), f"{name}, {workload.name}, {which}")
        digest = correctness.digest(tuple(found.values()))
        del found
        before = self._device.allocated()
        most = max(0, self._device.peak(calls[0]) - before)
        ready = Prepared(calls, inputs.alternating(calls))
        ready.batches[CALL] = batch_of(ready.call, self._device)
        if isinstance(self._device, Gpu):
            ready.batches[DEVICE] = self._graph(calls)
        self._ready[name] = ready
        return {"bits": digest, "peak bytes": most}

    def _graph(self, calls: Sequence[Call]) -> timer.Batch:
        """Device time: the calls, over and over, in one CUDA graph that lasts long enough to be timed."""
        assert isinstance(self._device, Gpu)
        some = list(calls[:MOST_CALLS])
        once = self._device.seconds_a_call(some[0])
        rounds = max(1, min(MOST_CALLS, int(REPLAY / max(once, 1e-9))) // len(some))
        return self._device.graph(rounds * some)

    def _raise_peak(self, workload: Workload, answers: dict[str, Any]) -> None:
        found = roofline.peak_flops(workload.dtype, self._device)
        if found is None:
            return
        batches = {CALL: batch_of(found.call, self._device)}
        if isinstance(self._device, Gpu):
            batches[DEVICE] = self._graph([found.call])
        self._ready[PEAK] = Prepared([found.call], found.call, batches)
        answers[PEAK] = {"flops": found.flops}


def counted() -> dict[str, Any]:
    """How many products of torch's the switch has put on these kernels."""
    return matmul_grad.info()["accelerated"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--process", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pin", action="store_true")
    command = parser.parse_args()
    if command.pin and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[: command.threads])  # moving between cores costs warm caches
    torch.set_num_threads(command.threads if command.process == TORCH_PROCESS else 1)
    device: Device = Cpu()
    if command.device != "cpu":
        device = Gpu()
        device.multiply_in_ieee()
        device.ready()
    worker.serve(BackendSession(device).answer)


if __name__ == "__main__":
    main()
