"""The CPU at hand: instruction set, caches, and what to generate code for."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import llvmlite.binding as llvm

from .build import Machine
from .config import ISAS, Cpu

# What a narrower instruction set than the host's own is compiled for, so that forcing it means something.
BASELINES = {"avx2": "x86-64-v3", "generic": "x86-64"}


@functools.cache
def host_features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


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
    wanted = isa or os.environ.get("MATMUL_GRAD_ISA") or available[0]
    if wanted not in ISAS:
        raise ValueError(f"the instruction set must be one of {', '.join(ISAS)}, got {wanted}")
    if wanted not in available:
        raise RuntimeError(f"{wanted} was asked for, but this CPU has only {', '.join(available)}")
    fused = wanted != "generic" or is_arm()
    pairs = wanted == "avx512" and bool(host_features().get("avx512bf16"))
    return Cpu(wanted, _cache_bytes(2, 1 << 20), _cache_bytes(3, 8 << 20), fused, pairs, halves=fused)


def machine(isa: str) -> Machine:
    """Code generation for this host, held to what ``isa`` has."""
    triple = llvm.get_process_triple()
    if isa == host_isas()[0]:
        features = ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(host_features().items()))
        return Machine(triple, llvm.get_host_cpu_name(), features)
    return Machine(triple, "generic" if is_arm() else BASELINES[isa], "")


@functools.cache
def _cache_bytes(level: int, default: int) -> int:
    """Size of the cache of ``level`` as Linux reports it for the first core, else ``default``."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if int((index / "level").read_text()) == level:
                size = (index / "size").read_text().strip()
                return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return default
