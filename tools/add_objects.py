"""From the wheel of any platform, the wheel for Linux on x86-64: the same files, and the CPU kernels compiled.

    python tools/add_objects.py matmul_grad-0.1.0-py3-none-any.whl --out dist

The objects are compiled from the wheel's own sources, so that their hash is that of what is installed, for each level
of kernels/cpu/levels.py, whatever CPU this runs on.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What the objects call of the C library is older than that: memory, and the scheduler's masks of CPUs.
PLATFORM = "manylinux_2_17_x86_64"
TAG = f"py3-none-{PLATFORM}"
CPU = "matmul_grad.kernels.cpu"
OBJECTS = "matmul_grad/kernels/cpu/objects"
LEVELS = ("avx2", "avx512", "avx512_bf16")  # what one level compiles is not compiled for the later ones
DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_objects(wheel: Path, out: Path, levels: Sequence[str] = LEVELS, dtypes: Sequence[str] = DTYPES) -> Path:
    """The new wheel."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree)
        for level in levels:
            compile_in(tree, level, dtypes)
        return pack(tree, wheel, out)


def compile_in(tree: Path, level: str, dtypes: Sequence[str]) -> None:
    """Compile the kernels of a tree in a separate process, which imports that tree."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    code = f"import runpy; runpy.run_path({__file__!r})['compile_level']({level!r}, {list(dtypes)!r}, {str(tree)!r})"
    subprocess.run([sys.executable, "-B", "-c", code], env=environment, cwd=tree, check=True)


def compile_level(name: str, dtypes: Sequence[str], tree: str) -> None:
    """Write the objects of a level into the tree that this process imports."""
    from matmul_grad.kernels.cpu import build, config, host, levels, object_file, prebuilt

    assert Path(tree, OBJECTS) == prebuilt.FOLDER, f"{prebuilt.FOLDER} is not in the wheel"
    index = [level.name for level in levels.LEVELS].index(name)
    level, lower = levels.LEVELS[index], levels.LEVELS[index + 1 :]

    def load(
        key: str, name: str, kernels: Callable[[], build.Kernels], machine: object, symbols: Any, package: str = CPU
    ) -> Any:
        sources = build.sources_digest(package)
        files = [prebuilt.FOLDER / prebuilt.file_name(key, name, sources, each) for each in (level, *lower)]
        if not any(file.exists() for file in files):
            code = build.compiled(key, name, kernels, level.machine, symbols, package)
            object_file.write(files[0], code)
            print(f"{level.name}: {name}, {files[0].stat().st_size:,} bytes", flush=True)
        return NotLoaded()

    build.SLOW = 1e6
    build.load = load
    host.cpu = lambda isa=None: config.Cpu(level.isa, bf16_dot=level.bf16_dot)
    host.machine = lambda isa: level.machine
    load_all(dtypes)


class NotLoaded:
    """A set that was compiled for another CPU than this."""

    def address(self, name: str) -> int:
        return 0


def load_all(dtypes: Sequence[str]) -> None:
    """Every set that a process may load."""
    from matmul_grad import cuda
    from matmul_grad.kernels.cpu import driver
    from matmul_grad.kernels.native import override_cpu, register

    register.load_gradient_entries(register.load_own_entries())
    register.load_out_entries()
    override_cpu.load()
    register.load_cuda({f"matmul_grad_cuda_{name}": 0 for name in (*cuda.DRIVER, "stream")})
    for dtype in dtypes:
        driver.load_all(driver.config(dtype))


def pack(tree: Path, wheel: Path, out: Path) -> Path:
    """A wheel of a tree, for PLATFORM: it holds machine code, so it is not pure; of Python it needs no version."""
    (info,) = tree.glob("*.dist-info")
    about = [
        line for line in (info / "WHEEL").read_text().splitlines() if not line.startswith(("Root-Is-Purelib:", "Tag:"))
    ]
    about = [*filter(None, about), "Root-Is-Purelib: false", f"Tag: {TAG}"]
    (info / "WHEEL").write_text("\n".join(about) + "\n")
    files = sorted(path for path in tree.rglob("*") if path.is_file() and path != info / "RECORD")
    files.sort(key=lambda path: path.is_relative_to(info))  # the metadata last, as packaging recommends
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    for path in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        writer.writerow((path.relative_to(tree).as_posix(), f"sha256={digest}", path.stat().st_size))
    writer.writerow(((info / "RECORD").relative_to(tree).as_posix(), "", ""))
    (info / "RECORD").write_text(rows.getvalue())
    out.mkdir(parents=True, exist_ok=True)
    name, version, *_ = wheel.stem.split("-")
    made = out / f"{name}-{version}-{TAG}.whl"
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (*files, info / "RECORD"):
            entry = zipfile.ZipInfo(
                path.relative_to(tree).as_posix()
            )  # of one date, so that equal files make equal wheels
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, path.read_bytes())
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--levels", default=",".join(LEVELS), help="default: all, %(default)s")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="default: all, %(default)s")
    given = parser.parse_args(arguments)
    made = add_objects(given.wheel, given.out, given.levels.split(","), given.dtypes.split(","))
    print(f"{made}, {made.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
