"""The wheel that carries compiled kernels: it is built, installed, and multiplies where nothing can be compiled."""

import base64
import csv
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.utils import parse_wheel_filename
from wheels import ROOT, Built, install, run

import matmul_grad
from matmul_grad.kernels.cpu import host, levels, object_file, prebuilt
from matmul_grad.testing import integers

HERE = [level.name for level in levels.fitting(host.machine(host.cpu().isa))]
FOLDER = "matmul_grad/kernels/cpu/objects/"
SETS = {"own_entries", "out_entries", "gradient_entries", "aten_entries", "cuda_entries"}
runs_avx2 = pytest.mark.skipif("avx2" not in HERE, reason="the objects are for Linux on x86-64 with AVX2")

# Prints the bits of a product and its gradients. A second import of the name fails, as if Numba were not installed.
MULTIPLY = """
import sys, torch
sys.modules["numba"] = None
import matmul_grad
from matmul_grad.testing import integers
a, b = (torch.randn(67, 67, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (1, 2))
with matmul_grad.strict():
    c = matmul_grad.mm(a, b)
    c.backward(integers(67, 67, torch.float32, 1))
    d = matmul_grad.conv2d(a.detach().view(1, 67, 67, 1), b.detach()[:, :, None, None], padding=1)
assert matmul_grad.ops.native_status() == ""
if sys.argv[1:]:
    matmul_grad.enable()
    torch.mm(a, b)
    assert matmul_grad.enabled() and "accelerated" in str(matmul_grad.info()), matmul_grad.info()
assert sys.modules["numba"] is None and matmul_grad.__file__.startswith(sys.path[1]), matmul_grad.__file__
print(*[x.detach().numpy().tobytes().hex() for x in (c, a.grad, b.grad, d)])
"""


@pytest.fixture(scope="module")
def wheel(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what one product in float32 needs on AVX2; the others are compiled in the same way."""
    folder = tmp_path_factory.mktemp("objects")
    run(
        sys.executable,
        built.copy / "tools" / "add_objects.py",
        built.direct,
        "--out",
        folder,
        "--levels",
        "avx2",
        "--dtypes",
        "float32",
        cwd=folder,
    )
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    install(wheel, target)
    return target


@runs_avx2
def test_wheel_is_for_linux_on_x86_and_any_python(wheel: Path) -> None:
    name, version, _, tags = parse_wheel_filename(wheel.name)
    assert (name, str(version)) == ("matmul-grad", matmul_grad.__version__)
    assert [str(tag) for tag in tags] == ["py3-none-manylinux_2_17_x86_64"]
    with zipfile.ZipFile(wheel) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    (about,) = (data.decode() for name, data in files.items() if name.endswith(".dist-info/WHEEL"))
    assert "Root-Is-Purelib: false\nTag: py3-none-manylinux_2_17_x86_64\n" in about and about.count("Tag:") == 1
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    rows = {row[0]: row[1:] for row in csv.reader(files[record].decode().splitlines())}
    assert rows.pop(record) == ["", ""]
    assert {*rows} == {*files} - {record}
    for name, (digest, size) in rows.items():
        expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={expected}", str(len(files[name]))), name
    objects = {name.removeprefix(FOLDER).rsplit("-", 1)[0] for name in files if name.startswith(FOLDER)}
    dtype = "sgemm_avx2_6x16"
    assert objects == SETS | {"gemm", "derivative", dtype, f"{dtype}_activations", f"{dtype}_patches"}


@runs_avx2
@pytest.mark.parametrize("switch", [(), ("switch",)], ids=["operators", "switch"])
def test_wheel_multiplies_without_numba(switch: tuple[str, ...], installed: Path, tmp_path: Path) -> None:
    """From an empty cache, where nothing is kept; the bits are those of kernels that were compiled here."""
    output = run(
        sys.executable, "-c", MULTIPLY, *switch, cwd=tmp_path, PYTHONPATH=str(installed), MATMUL_GRAD_ISA="avx2",
        MATMUL_GRAD_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert not list((tmp_path / "cache").glob("*.o"))
    a, b = (torch.randn(67, 67, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (1, 2))
    c = matmul_grad.mm(a, b)
    c.backward(integers(67, 67, torch.float32, 1))
    assert a.grad is not None and b.grad is not None
    d = matmul_grad.conv2d(a.detach().view(1, 67, 67, 1), b.detach()[:, :, None, None], padding=1)
    assert output.split() == [x.detach().numpy().tobytes().hex() for x in (c, a.grad, b.grad, d)]


@runs_avx2
def test_sources_that_were_edited_do_not_use_the_objects(installed: Path, tmp_path: Path) -> None:
    ask = """
from matmul_grad.kernels.cpu import build, host, levels, prebuilt
level = levels.LEVELS[-1]
for package in (prebuilt.__package__, "matmul_grad.kernels.native"):
    __import__(package)
    for key in ("own_entries", "aten_entries"):
        print(prebuilt.find(key, key, build.sources_digest(package), level.machine) is not None)
"""
    assert (
        run(sys.executable, "-c", ask, cwd=tmp_path, PYTHONPATH=str(installed)).split() == ["False"] * 2 + ["True"] * 2
    )
    edited = installed / "matmul_grad/kernels/cpu/memory.py"
    before = edited.read_bytes()
    try:
        edited.write_bytes(before + b"\nEDITED = True\n")
        found = run(sys.executable, "-c", ask, cwd=tmp_path, PYTHONPATH=str(installed)).split()
        assert found == ["False"] * 4
    finally:
        edited.write_bytes(before)


@pytest.mark.slow
@runs_avx2
def test_wheel_of_all_levels(built: Built, tmp_path: Path) -> None:
    """Each set once: a later level has only what it compiles differently."""
    run(sys.executable, ROOT / "tools" / "add_objects.py", built.direct, "--out", tmp_path, cwd=tmp_path)
    (made,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        objects = sorted(
            name.removeprefix(FOLDER).rsplit("-", 1)[0] for name in archive.namelist() if name.startswith(FOLDER)
        )
    tiles = {"avx2": "6x16", "avx512": "6x64"}
    dtypes = {f"{dtype}gemm_{isa}_{tile}" for dtype in "sbh" for isa, tile in tiles.items()}
    dtypes |= {"dgemm_avx2_6x8", "dgemm_avx512_6x32", "bgemm_avx512_bf16_6x64"}
    more = {f"{name}_{part}" for name in dtypes for part in ("patches", "activations")}
    assert objects == sorted(SETS | {"gemm", "derivative"} | dtypes | more)
    print(f"{made.stat().st_size:,} bytes, {built.direct.stat().st_size:,} without objects")


# Prints the hash of an object for a level, compiled where the CPU seems to be another. Arguments: the folder of the
# package `cpu`, the level, and the name of the CPU.
COMPILE = """
import hashlib, sys
import llvmlite.binding as llvm
class Features(dict):
    def flatten(self, sort=True):
        return ",".join("+" + name for name in self)
if sys.argv[3:]:
    llvm.get_host_cpu_name = lambda: sys.argv[3]
    llvm.get_host_cpu_features = lambda: Features.fromkeys(("avx", "avx2", "avx512f", "avx512vl", "avx512bw"))
sys.path.insert(0, sys.argv[1])
from cpu import build, levels
from cpu.numba_settings import needed_settings
(level,) = (level for level in levels.LEVELS if level.name == sys.argv[2])
with needed_settings():
    from numba.core import types
    from cpu.memory import INT64, get, put
    def add(address, count):
        total = 0
        for i in range(count):
            total += get(address, i) ^ i
        put(address, 0, total)
    module = build.to_module({"add": (add, types.void(INT64, INT64))}, level.machine, ())
    print(hashlib.sha256(level.machine.llvm().emit_object(module)).hexdigest())
"""


@pytest.mark.skipif(host.is_arm(), reason="LLVM is told another x86-64 CPU than the one at hand")
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_objects_do_not_depend_on_the_cpu_that_makes_them(level: str, tmp_path: Path) -> None:
    arguments = [str(ROOT / "kernels"), level]
    here, there = (
        run(sys.executable, "-B", "-c", COMPILE, *arguments, *cpu, cwd=tmp_path) for cpu in ((), ("znver4",))
    )
    assert here == there


# --- which object is used -----------------------------------------------------------------------------------

V3 = {"avx", "avx2", "bmi", "bmi2", "cx16", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sahf", "xsave"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("features", "names"),
    [
        (V3, ["avx2"]),
        (V4, ["avx512", "avx2"]),
        (V4 | {"avx512bf16", "sse4a"}, ["avx512_bf16", "avx512", "avx2"]),
        (V4 - {"avx512cd"}, ["avx2"]),
        (V3 - {"f16c"}, []),
        (V4 - {"movbe"}, []),
        (set(), []),
    ],
)
def test_levels_that_a_cpu_runs(features: set[str], names: list[str]) -> None:
    missing = ["-avx10.1", *(f"-{name}" for name in V4 | {"avx512bf16"} if name not in features)]
    text = ",".join([*(f"+{name}" for name in sorted(features)), *missing])
    found = levels.fitting(levels.Machine("x86_64-pc-linux-gnu", "znver3", text))
    assert [level.name for level in found] == names
    for triple in ("x86_64-apple-darwin23", "x86_64-pc-windows-msvc", "aarch64-unknown-linux-gnu"):
        assert levels.fitting(levels.Machine(triple, "znver3", text)) == ()


def test_forced_instruction_sets() -> None:
    """As `host.machine` has them on a CPU that has more."""
    baselines = {isa: levels.Machine(levels.LINUX_X86, cpu, "") for isa, cpu in host.BASELINES.items()}
    assert [level.name for level in levels.fitting(baselines["avx2"])] == ["avx2"]
    assert levels.fitting(baselines["generic"]) == ()


def test_objects_are_checked_by_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best, *_, last = levels.LEVELS
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    path = tmp_path / prebuilt.file_name("key", "set", "sources", last)
    object_file.write(path, b"code")
    for level in (best, last):
        assert prebuilt.find("key", "set", "sources", level.machine) == b"code"
    for changed in (
        ("key2", "set", "sources"),
        ("key", "set2", "sources"),
        ("key", "set", "sources2"),
        ("key", "set", ""),
    ):
        assert prebuilt.find(*changed, last.machine) is None
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert prebuilt.find("key", "set", "sources", last.machine) is None
    path.unlink()
    assert prebuilt.find("key", "set", "sources", last.machine) is None
