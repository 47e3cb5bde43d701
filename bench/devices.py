"""The two devices: what the bench needs of the CPU (`Cpu`) and of the current GPU (`Gpu`)."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..kernels.cpu import host

__all__ = ["Batch", "Call", "Cpu", "Gpu"]

Call = Callable[[], object]
Batch = Callable[[], float]

REPLAY = 0.5e-3  # seconds that one replay of a graph lasts at least: a hundred times what its start costs
MOST_CALLS = 256  # in one graph: of the smallest products more fit into the L2 cache, and recording takes time
SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
MOVING = ("clocks.sm", "power.draw", "temperature.gpu")  # of those, what a comparison is told beside its times
LOAD = 16384, 60  # size and number of products that keep any GPU busy while nvidia-smi looks at it
UNKNOWN = 64 << 20  # bytes of a last cache, where Linux reports none


class Cpu:
    """The processor and this process's memory; no call returns before it is done."""

    device = "cpu"

    def wait(self) -> None:
        pass

    def cache_bytes(self, caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
        """Of the last cache, all of it."""
        try:
            share = host.cache_share(3) or host.cache_share(2)
            sharers = max(host.count_cpus((path / "shared_cpu_list").read_text()) for path in caches.glob("index*"))
            return share * sharers or UNKNOWN
        except (OSError, ValueError):
            return UNKNOWN

    def free_bytes(self) -> int:
        """What can be had without anything being moved out; much, where it is not known."""
        for line in read("/proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
        return 1 << 40

    def tidy(self) -> None:
        pass

    def facts(self) -> dict[str, str]:
        """Clocks and load at this moment; the rest is `machine.describe`."""
        clocks = [
            line.split(":")[1].strip() for line in read("/proc/cpuinfo").splitlines() if line.startswith("cpu MHz")
        ]
        governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
        most = read("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").strip()
        found = {
            "clock": f"{float(clocks[0]):.0f} MHz" if clocks else "",
            "highest clock": f"{int(most) / 1000:.0f} MHz" if most else "",
            "governor": governor,
            "load at the start": read("/proc/loadavg").partition(" ")[0],
            "last cache": f"{self.cache_bytes() >> 20} MiB",
        }
        return {name: value for name, value in found.items() if value}


def read(path: str) -> str:
    """Empty where it cannot be."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def status(name: str) -> int:
    """Bytes, of a line of /proc/self/status; 0 where there is none."""
    for line in read("/proc/self/status").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def reset_peak() -> bool:
    """From here on VmHWM is the peak from here on; False where the system does not do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class Gpu:
    """The current CUDA device."""

    device = "cuda"

    def multiply_in_ieee(self) -> None:
        """torch's float32 "highest", whatever the environment says: what every figure of float32 is held against."""
        setting: Any = torch.backends.cuda.matmul
        setting.fp32_precision = "ieee"

    def ready(self) -> None:
        """Warm enough to time on: clocks that rise with the first work have risen."""
        gc.freeze()  # what is there now stays, and need not be looked at between two comparisons
        x = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        end = perf_counter() + 0.5
        while perf_counter() < end:
            torch.mm(x, x)
            self.wait()

    def wait(self) -> None:
        torch.cuda.synchronize()

    def cache_bytes(self) -> int:
        """The L2 cache's size."""
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info()[0])

    def tidy(self) -> None:
        """Give back what the last graphs and operands held."""
        gc.collect()
        free, total = torch.cuda.mem_get_info()
        if 2 * free < total:
            torch.cuda.empty_cache()

    def is_broken(self) -> bool:
        """An error of a kernel stays: every later call of the process meets it again."""
        try:
            self.wait()
            self.tidy()
        except Exception:
            return True
        return False

    def seconds_a_call(self, call: Call, calls: int = 3) -> float:
        """A first guess, by events."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls

    def looped(self, calls: Sequence[Call]) -> Batch:
        """Device time: the calls, over and over, in one CUDA graph that lasts long enough to be timed."""
        some = list(calls[:MOST_CALLS])
        rounds = max(1, min(MOST_CALLS, int(REPLAY / max(self.seconds_a_call(some[0]), 1e-9))) // len(some))
        return self.graph(rounds * some)

    def graph(self, calls: Sequence[Call]) -> Batch:
        """Record the calls into a CUDA graph; a batch replays it between two events: seconds of device time a call."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        self.wait()

        def batch() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / len(calls)

        return batch

    def allocated(self) -> int:
        return int(torch.cuda.memory_allocated())

    def peak(self, call: Call) -> int:
        """The most that was allocated during the call."""
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return int(torch.cuda.max_memory_allocated())

    def facts(self) -> dict[str, str]:
        """Name → fact, of the device and of what its driver says at this moment."""
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid = str(getattr(properties, "uuid", ""))
        at_rest = nvidia_smi(uuid)
        loaded = self.under_load(lambda: nvidia_smi(uuid))
        return {
            "GPU": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "L2 cache": f"{self.cache_bytes() / 2**20:.0f} MiB",
            "CUDA of torch": str(torch.version.cuda),
            **at_rest,
            **{f"{name}, working": value for name, value in loaded.items() if value != at_rest.get(name)},
        }

    def clocks(self) -> dict[str, str]:
        """Clocks, power and temperature, as the driver reports them at this moment."""
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = nvidia_smi(str(getattr(properties, "uuid", "")))
        return {name: value for name, value in found.items() if name in MOVING} or found

    def under_load(self, look: Callable[[], dict[str, str]]) -> dict[str, str]:
        """What ``look`` finds while the GPU multiplies."""
        n, count = LOAD
        if 3 * 2 * n * n > self.free_bytes():
            return {}
        x = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        out = torch.empty_like(x)
        for _ in range(count):
            torch.mm(x, x, out=out)
        found = look()
        self.wait()
        return found


def nvidia_smi(uuid: str) -> dict[str, str]:
    """What nvidia-smi says of the GPU (of the first, where it does not know the id), or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    for which in ([f"--id=GPU-{uuid}"] if uuid else [], []):
        try:
            done = subprocess.run([*command, *which], capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as reason:
            return {"nvidia-smi": f"not to be had: {type(reason).__name__}"}
        values = done.stdout.decode(errors="replace").strip().splitlines()
        if done.returncode == 0 and values:
            return dict(zip(SMI, (value.strip() for value in values[0].split(",")), strict=False))
    return {"nvidia-smi": f"ended with status {done.returncode}"}
