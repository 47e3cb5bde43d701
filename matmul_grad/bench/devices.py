"""What the bench asks the CPU, as `gpu_report.device.Gpu` answers it for a GPU."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from ..kernels.cpu import host

__all__ = ["Cpu", "cores"]

UNKNOWN = 64 << 20  # bytes of a last cache, where Linux reports none


def cores() -> list[int]:
    """The cores that this process may use.

    >>> len(cores()) >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


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

    def allocated(self) -> int:
        """Bytes that this process has in memory."""
        return status("VmRSS")

    def peak(self, call: Any) -> int:
        """The most that it had during the call."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        call()
        return status("VmHWM")

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
