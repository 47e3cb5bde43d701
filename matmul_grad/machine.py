"""What products run on here: processor, kernels, threads, versions. For `check`, `info` and the bench."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, ops, override

__all__ = ["describe", "describe_cache", "lines", "processor", "version"]


def describe() -> dict[str, str]:
    """Name → fact, in the order to be read. Registers the compiled operator, as a first product would.

    >>> print(*describe(), sep=", ")
    CPU, instruction set, caches, CPU kernels, GPU, operator, switch, threads, versions
    """
    from .kernels.cpu import config, driver, host

    cpu = host.cpu()
    kernels = [f"{driver.config(dtype).name} ({dtype})" for dtype in config.SIZES]
    packages = ["torch", "numba", "llvmlite", "triton"]
    return {
        "CPU": f"{processor()}, {os.cpu_count()} cores",
        "instruction set": f"{cpu.isa} of {', '.join(host.host_isas())}",
        "caches": f"L2 {cpu.l2 >> 10} KiB, L3 {cpu.l3 >> 10} KiB a core",
        "CPU kernels": ", ".join(kernels),
        "GPU": gpus(),
        "operator": operator(),
        "switch": switch(),
        "threads": f"{torch.get_num_threads()} of torch's own pool",
        "versions": ", ".join(
            [f"matmul_grad {__version__}", f"python {platform.python_version()}"]
            + [f"{package} {version(package)}" for package in packages]
        ),
    }


def lines(facts: dict[str, str]) -> list[str]:
    """Name and value in two columns.

    >>> print(*lines({"CPU": "fast", "threads": "2"}), sep="\\n")
    CPU      fast
    threads  2
    """
    width = max(len(name) for name in facts)
    return [f"{name:{width}}  {value}" for name, value in facts.items()]


def processor() -> str:
    """The CPU's model name.

    >>> len(processor()) > 0
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(names)


def operator() -> str:
    why_not = ops.native_status()
    return f"in Python, since {why_not}" if why_not else "native, over torch's stable C ABI"


def switch() -> str:
    """Whether torch's own products run on these kernels, and how many have."""
    known = override.info()
    counted = [
        f"{outcome.replace('_', ' ')} {operator} {dtype} {calls}"
        for outcome in ("accelerated", "handed_over")
        for operator, dtypes in known[outcome].items()
        for dtype, calls in dtypes.items()
    ]
    return "; ".join([f"on for {', '.join(known['on'])}" if known["on"] else "off", *counted])


def version(package: str) -> str:
    """The installed version, read without importing the package.

    >>> version("no such package")
    'missing'
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def describe_cache() -> str:
    """Where compiled kernels are kept, and how many are there.

    >>> "kernels" in describe_cache()
    True
    """
    from .kernels.cpu import build

    folder = build.cache_folder()
    if folder is None:
        return "none (0 kernels): the user has no home folder, and MATMUL_GRAD_CACHE is not set"
    sizes = [path.stat().st_size for path in folder.glob("*.o")]
    return f"{folder} ({len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB)"
