"""The compiled sets that are the slowest to compile, for tests in which only the first product of a dtype compiles.

The entries and the driver of all dtypes take 20 s of compiling, the set of one dtype takes one.
"""

from __future__ import annotations

from pathlib import Path

import torch

import matmul_grad
from matmul_grad.kernels.cpu import build, driver, host, levels, object_file, prebuilt

NATIVE = "matmul_grad.kernels.native"
SLOWEST = (("own_entries", NATIVE), ("gradient_entries", NATIVE), ("gemm", prebuilt.__package__))


def as_wheel(folder: Path) -> str:
    """Code after which the slowest sets are found in ``folder``, as a wheel carries them.

    Where no wheel carries objects, as for other instruction sets, they are compiled.
    """
    machine = host.machine(host.cpu().isa)
    for name, package in SLOWEST:
        code = object_file.read(_path(name, package))
        assert code is not None
        for level in levels.fitting(machine)[:1]:
            object_file.write(folder / prebuilt.file_name(name, name, build.sources_digest(package), level), code)
    return (
        f"import pathlib\nfrom {prebuilt.__package__} import prebuilt\n"
        f"prebuilt.FOLDER = pathlib.Path({str(folder)!r})\n"
    )


def copy_cache(folder: Path, *dtypes: str) -> None:
    """The sets that a product of these dtypes loads."""
    folder.mkdir()
    for name, package in SLOWEST:
        path = _path(name, package)
        (folder / path.name).write_bytes(path.read_bytes())
    for dtype in dtypes:
        driver.gemm_address(driver.config(dtype))
        found = build.cache_folder()
        assert found is not None
        for path in found.glob(f"{driver.config(dtype).name}-*.o"):
            (folder / path.name).write_bytes(path.read_bytes())


def _path(name: str, package: str) -> Path:
    """In the cache, where it has been compiled now."""
    matmul_grad.mm(torch.ones(2, 2), torch.ones(2, 2, requires_grad=True))
    path = build.object_path(name, name, host.machine(host.cpu().isa), package)
    assert path is not None and path.exists(), path
    return path
