"""The process of some backends: it makes their products ready, checks them, and times them when it is asked.

{"prepare": {workload}, "names": [...]}     → {"copies": n, "backends": {name: {...}}}
{"time": name, "clock": "call"}             → {"seconds": a call, "share": of a core}
{"memory": name, "of": {workload}}          → {"peak bytes": of a call}, on a CPU
{"bandwidth": true}                         → GB/s of memory
{"facts": true}                             → what it runs on
{"clocks": true}                            → clocks, power and temperature of a GPU at this moment
{"do": name, ...}                           → what a task of `gpu_tasks` found

Where something cannot be done, the answer has a "skipped", "wrong" or "failed" that names the reason, and "broken"
where the GPU is of no use to this process any more: whoever asked starts another one.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import traceback
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

import matmul_grad

from . import backends, correctness, inputs, memory, roofline, timer, worker
from .backends import PEAK, TORCH_PROCESS, Call, Library, call_of
from .devices import Cpu, Gpu, reset_peak, status
from .inputs import Operands
from .roofline import Device
from .timer import CALL_CLOCK, DEVICE_CLOCK
from .workloads import INVARIANT, OURS, Workload

LOG = 2000  # characters of a traceback that an answer keeps


class SelfComparison(AssertionError):
    """A backend that does not do by itself what its name says."""


class BackendSession:
    """Answers the runner's tasks with the libraries of this process."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._libraries: dict[str, Library] = {}
        self._ready: dict[str, dict[str, timer.Batch]] = {}  # backend → clock → batch, of the workload at hand
        self._mode = contextlib.ExitStack()  # that the workload at hand is measured in

    def answer(self, task: worker.Message) -> worker.Message:
        return self._attempt(functools.partial(self._do, task), task.get("memory", ""))

    def _do(self, task: worker.Message) -> worker.Message:
        if "prepare" in task:
            return self.prepare(Workload(**task["prepare"]), task["names"])
        if "time" in task:
            share = timer.share_of_core()
            seconds = self._ready[task["time"]][task["clock"]]()
            return {"seconds": seconds, "share": share()}
        if "memory" in task:
            return memory.of_call(task["memory"], Workload(**task["of"]))
        if "bandwidth" in task:
            return roofline.bandwidth(self._device)
        if "do" in task:
            return self._do_task(**task)
        if "clocks" in task:
            return {"clocks": self._device.clocks() if isinstance(self._device, Gpu) else {}}
        return {"facts": self._device.facts()}

    def _do_task(self, do: str, **arguments: Any) -> worker.Message:
        from . import gpu_tasks

        self._device.tidy()
        return gpu_tasks.TASKS[do](self._device, **arguments)

    def prepare(self, workload: Workload, names: Sequence[str]) -> worker.Message:
        """Each backend correct, or why it is not, in which case it is not timed."""
        self._ready.clear()
        self._mode.close()
        self._device.tidy()
        reset_peak()
        free = self._device.free_bytes()
        if 4 * workload.held > free:
            return {"skipped": f"needs {4 * workload.held / 2**30:.1f} GiB of free memory"}
        if workload.mode == INVARIANT:
            self._mode.enter_context(matmul_grad.deterministic(batch_invariant=True))
        whole = inputs.draw(workload, "integers", self._device.device)
        answers: dict[str, Any] = {}
        for name in names:
            if name != PEAK:
                answers[name] = self._attempt(functools.partial(self._first, name, workload, whole), name)
                if answers[name].pop("broken", False):
                    return {"backends": answers, "broken": True}
        beyond = status("VmHWM") - workload.held - workload.given
        del whole
        normal = inputs.draw(workload, "normal", self._device.device)
        inputs.assert_normal(normal)
        count = inputs.copies_past(self._device.cache_bytes(), workload.held, free)
        sets = list(inputs.copies(normal, count))
        for name in names:
            if name == PEAK:
                self._raise_peak(workload, answers)
            elif "first" in answers[name]:
                answers[name] |= self._attempt(functools.partial(self._make_ready, name, workload, sets), name)
                if answers[name].pop("broken", False):
                    return {"backends": answers, "broken": True}
        beyond = max(beyond, status("VmHWM") - count * workload.held - workload.given)
        return {"copies": count, "backends": answers, "beyond": beyond}

    def _attempt(self, do: Callable[[], worker.Message], name: str = "") -> worker.Message:
        """What it gives, or in place of that what was wrong; an error takes no other backend with it."""
        try:
            with matmul_grad.strict() if name == OURS else contextlib.nullcontext():
                return do()
        except backends.Skipped as reason:
            return {"skipped": str(reason)}
        except AssertionError as reason:
            return {"wrong": str(reason)}
        except torch.cuda.OutOfMemoryError:
            return {"skipped": "out of device memory"}
        except Exception as reason:
            found = worker.reason_of(reason)
            if isinstance(self._device, Gpu):
                found["log"] = traceback.format_exc()[-LOG:]
                found |= {"broken": True} if self._device.is_broken() else {}
            return found

    def _first(self, name: str, workload: Workload, whole: Operands) -> dict[str, Any]:
        """The first call, and every element of it on integers."""
        if name not in self._libraries:
            self._libraries[name] = backends.BY_NAME[name].library()
        library, before = self._libraries[name], counted()
        held = self._device.allocated() if isinstance(self._device, Gpu) else 0
        self._device.wait()
        start = perf_counter()
        result = call_of(library, workload, whole)()
        self._device.wait()
        first = perf_counter() - start
        if name != OURS and counted() != before:
            raise SelfComparison(f"{name} runs on the kernels of matmul_grad: it would be compared with itself")
        correctness.assert_products(library, workload, whole, result, "integers", name)
        del result
        kept = {"kept bytes": max(0, self._device.allocated() - held)} if isinstance(self._device, Gpu) else {}
        return {"first": timer.rounded(first), **kept}

    def _make_ready(self, name: str, workload: Workload, sets: Sequence[Operands]) -> dict[str, Any]:
        """Judged on the operands that it is timed on."""
        library = self._libraries[name]
        calls = [call_of(library, workload, each) for each in sets]
        found = correctness.assert_products(library, workload, sets[0], calls[0](), "normal", name)
        if name == OURS and workload.mode == INVARIANT:
            correctness.assert_rows_alone(matmul_grad.mm, sets[0].a, sets[0].b, f"{name}, {workload.name}")
        answer: dict[str, Any] = {"bits": correctness.digest(tuple(found.values()))}
        del found
        if isinstance(self._device, Gpu):
            before = self._device.allocated()
            answer["peak bytes"] = max(0, self._device.peak(calls[0]) - before)
        self._ready[name] = self._batches(calls)
        return answer

    def _batches(self, calls: Sequence[Call]) -> dict[str, timer.Batch]:
        """By clock; the calls are one for each copy of the operands."""
        batches = {CALL_CLOCK: timer.batch_of(inputs.alternating(calls), self._device.wait)}
        if isinstance(self._device, Gpu):
            batches[DEVICE_CLOCK] = self._device.looped(calls)
        return batches

    def _raise_peak(self, workload: Workload, answers: dict[str, Any]) -> None:
        found = roofline.peak_flops(workload.dtype, self._device)
        if found is None:
            return
        self._ready[PEAK] = self._batches([found.call])
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
        os.sched_setaffinity(
            0, sorted(os.sched_getaffinity(0))[: command.threads]
        )  # moving between cores costs warm caches
    torch.set_num_threads(command.threads if command.process == TORCH_PROCESS else 1)
    device: Device = Cpu()
    if command.device != "cpu":
        device = Gpu()
        device.multiply_in_ieee()
        if command.process == TORCH_PROCESS:  # others time nothing
            device.ready()
    worker.serve(BackendSession(device).answer)


if __name__ == "__main__":
    main()
