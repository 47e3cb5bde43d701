"""The CPU at hand: instruction set, caches, and what to generate code for."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import llvmlite.binding as llvm

from .config import ISAS, Cpu
from .fork_safety import fork_safe_lock
from .levels import Machine

# Bytes of L2 and of L3 that a core has, by LLVM's name of the CPU, for systems that do not report their caches. From
# the makers: AMD's software optimisation guides 56305, 56665, 57647 and 58455; Intel's optimisation reference manual,
# L3 of the server parts; Arm's technical reference manuals, L3 of AWS Graviton 2, 3 and 4.
KNOWN = {
    "znver2": (512 << 10, 4 << 20),
    "znver3": (512 << 10, 4 << 20),
    "znver4": (1 << 20, 4 << 20),
    "znver5": (1 << 20, 4 << 20),
    "haswell": (256 << 10, 2560 << 10),
    "broadwell": (256 << 10, 2560 << 10),
    "skylake": (256 << 10, 2 << 20),
    "skylake-avx512": (1 << 20, 1408 << 10),
    "cascadelake": (1 << 20, 1408 << 10),
    "icelake-server": (1280 << 10, 1536 << 10),
    "sapphirerapids": (2 << 20, 1920 << 10),
    "neoverse-n1": (1 << 20, 512 << 10),
    "neoverse-v1": (1 << 20, 512 << 10),
    "neoverse-v2": (2 << 20, 384 << 10),
}
UNKNOWN = (512 << 10, 1 << 20)

# What a forced instruction set, narrower than the host's own, is compiled for.
BASELINES = {"avx2": "x86-64-v3", "generic": "x86-64"}


# llvmlite locks every call, and a forked child would find its lock taken by a thread that it does not have.
_lock = fork_safe_lock()


@functools.cache
def host_features() -> dict[str, bool]:
    with _lock:
        return dict(llvm.get_host_cpu_features())


@functools.cache
def host_name() -> str:
    """LLVM's name of this CPU."""
    with _lock:
        return llvm.get_host_cpu_name()


@functools.cache
def host_triple() -> str:
    with _lock:
        return llvm.get_process_triple()


def is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def host_isas() -> tuple[str, ...]:
    """Instruction sets that this CPU can run, best first."""
    if is_arm():
        return ("neon", "generic")
    features = host_features()
    isas = []
    if all(features.get(name) for name in ("avx512f", "avx512vl", "avx512dq", "avx512bw")):
        isas.append("avx512")
    if features.get("avx2") and features.get("fma"):
        isas.append("avx2")
    return (*isas, "generic")


def cpu(isa: str | None = None) -> Cpu:
    """This machine, on ``isa``, else ``$MATMUL_GRAD_ISA``, else its widest instruction set."""
    available = host_isas()
    chosen = isa or os.environ.get("MATMUL_GRAD_ISA") or available[0]
    if chosen not in ISAS:
        raise ValueError(f"the instruction set must be one of {', '.join(ISAS)}, got {chosen}")
    if chosen not in available:
        raise RuntimeError(f"{chosen} was asked for, but this CPU has only {', '.join(available)}")
    fused = chosen != "generic" or is_arm()
    bf16_dot = chosen == "avx512" and bool(host_features().get("avx512bf16"))
    l2, l3 = KNOWN.get(host_name(), UNKNOWN)
    return Cpu(chosen, cache_share(2) or l2, cache_share(3) or l3, fused, bf16_dot, has_fp16_convert=fused)


def machine(isa: str) -> Machine:
    """Code generation for this host, restricted to ``isa``."""
    triple = host_triple()
    if isa == host_isas()[0]:
        features = ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(host_features().items()))
        return Machine(triple, host_name(), features)
    return Machine(triple, "generic" if is_arm() else BASELINES[isa], "")


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cache_share(level: int, caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of the first core's cache of ``level``, divided by the cores that share it; 0 where Linux reports none."""
    for index in caches.glob("index*"):
        try:
            if int((index / "level").read_text()) == level:
                size = (index / "size").read_text().strip()
                sharers = (index / "shared_cpu_list").read_text().strip()
                return (int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]) // count_cpus(sharers)
        except (OSError, ValueError, KeyError):
            continue
    return 0


def count_cpus(ranges: str) -> int:
    """How many CPUs a list of the kernel's names.

    >>> count_cpus("0-3,8-11"), count_cpus("5")
    (8, 1)
    """
    ends = [[int(end) for end in part.split("-")] for part in ranges.split(",")]
    return sum(last - first + 1 for first, *_, last in ([*pair, pair[-1]] for pair in ends))
