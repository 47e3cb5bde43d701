"""What products run on here: processor, kernels, threads, versions. For `check`, `info` and the bench."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, aten_override, ops

__all__ = [
    "cache_folder", "cpu_dtypes", "describe", "describe_cache", "lines", "processor", "usable_cores", "version",
]  # fmt: skip

CONTROL_GROUPS = Path("/sys/fs/cgroup")  # where Linux mounts them
MEMBERSHIP = Path("/proc/self/cgroup")  # those that this process is in


def describe() -> dict[str, str]:
    """Name → fact, in the order to be read. Registers the compiled operator, as a first product would.

    >>> print(*describe(), sep=", ")
    CPU, instruction set, caches, CPU kernels, GPU, operator, switch, threads, versions
    """
    from .kernels.cpu import driver, host

    cpu = host.cpu()
    kernels = [f"{driver.config(dtype).name} ({dtype})" for dtype in cpu_dtypes()] + left_to_torch()
    packages = ["torch", "numba", "llvmlite", "triton"]
    return {
        "CPU": f"{processor()}, {os.cpu_count()} cores",
        "instruction set": f"{cpu.isa} of {', '.join(host.host_isas())}",
        "caches": f"L2 {cpu.l2 >> 10} KiB, L3 {cpu.l3 >> 10} KiB a core",
        "CPU kernels": ", ".join(kernels),
        "GPU": gpus(),
        "operator": operator(),
        "switch": switch(),
        "threads": threads(),
        "versions": ", ".join(
            [f"matmul_grad {__version__}", f"python {platform.python_version()}"]
            + [f"{package} {version(package)}" for package in packages]
        ),
    }


def cpu_dtypes() -> list[str]:
    """The dtypes with a kernel on this CPU.

    >>> cpu_dtypes()[:2]
    ['float32', 'float64']
    """
    from .kernels.cpu import driver

    return list(filter(driver.supports, all_dtypes()))


def all_dtypes() -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in ops.DTYPES]


def left_to_torch() -> list[str]:
    """A note for each dtype without a kernel on this CPU, where the other CPUs have one."""
    return [
        f"{dtype} falls back to torch (no instructions that convert it)"
        for dtype in all_dtypes()
        if dtype not in cpu_dtypes()
    ]


def usable_cores() -> int:
    """How many cores this process may use.

    >>> usable_cores() >= 1
    True
    """
    from .kernels.cpu import host

    return host.usable_cores()


def threads() -> str:
    """torch's threads, and the quota of the control group where it is less: some of them wait for each other then."""
    count, quota = torch.get_num_threads(), cpu_quota()
    known = f"{count} of torch's pool"
    if quota is None or quota >= count:
        return known
    fewer = f"torch.set_num_threads({max(1, int(quota))})"
    return f"{known}, more than the {quota:.3g} cores that the control group allows: {fewer} leaves none waiting"


def cpu_quota() -> float | None:
    """Cores' worth of time that the control groups of this process allow it, of version 1 or 2; None without a limit.

    A group limits those in it too, and a container may see its own group alone, at the top.
    """
    quotas = []
    for line in read(MEMBERSHIP).splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers:  # of version 1
            tops = [CONTROL_GROUPS / controllers, CONTROL_GROUPS / "cpu"] if "cpu" in controllers.split(",") else []
        else:
            tops = [CONTROL_GROUPS, CONTROL_GROUPS / "unified"]
        for top in tops:
            inner = top / path.strip("/")
            quotas += [quota_of(group) for group in (inner, *inner.parents) if group.is_relative_to(top)]
    return min((quota for quota in quotas if quota is not None), default=None)


def quota_of(group: Path) -> float | None:
    """The quota of one group, in version 2 or in version 1, where -1 is none."""
    given = read(group / "cpu.max").split() or [
        read(group / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    ]
    try:
        quota, period = map(int, given)
    except ValueError:  # "max", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def read(path: Path) -> str:
    """Empty where it cannot be."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


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
    known = read(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in known if line.startswith("model name")]
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
    """Whether torch's products run on these kernels, and how many have."""
    known = aten_override.info()
    counted = [
        f"{outcome.replace('_', ' ')} {operator} {dtype} {calls}"
        for outcome in ("accelerated", "handed_over")
        for operator, dtypes in known[outcome].items()
        for dtype, calls in dtypes.items()
    ]
    return "; ".join([f"on for {', '.join(known['on'])}" if known["on"] else "off", *counted])


def version(package: str) -> str:
    """The installed version, read without importing the package; of torch, its build too.

    >>> version("no such package")
    'missing'
    """
    if package == "torch":
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where they are not, as for a user without a home folder.

    >>> folder = cache_folder()
    >>> folder is None or folder.name != ""
    True
    """
    from .kernels.cpu import build

    return build.cache_folder()


def cached_kernels() -> list[Path]:
    folder = cache_folder()
    return [] if folder is None else list(folder.glob("*.o"))


def describe_cache() -> str:
    """Where compiled kernels are kept, and how many are there.

    >>> "kernels" in describe_cache()
    True
    """
    folder = cache_folder()
    if folder is None:
        return "none (0 kernels): the user has no home folder, and MATMUL_GRAD_CACHE is not set"
    sizes = [path.stat().st_size for path in cached_kernels()]
    return f"{folder} ({len(sizes)} kernels, {sum(sizes) / 1e6:.1f} MB)"
