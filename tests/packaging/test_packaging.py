"""What is built and installed, what importing it costs, and which way its imports point."""

import ast
import functools
import json
import os
import statistics
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from wheels import ROOT, Built, install, run

PACKAGE = "matmul_grad"
KERNELS = f"{PACKAGE}.kernels"
TORCH_SIDE = ["ops", "autograd", "out_variants", "api", "functional", "nn"]  # each may import those before it


def sources() -> dict[str, Path]:
    """Each module of the package by its installed name, read off the checkout."""
    files = {
        **{f.relative_to(ROOT): f for f in (ROOT / PACKAGE).rglob("*.py")},
        **{PACKAGE / f.relative_to(ROOT): f for f in (ROOT / "bench").glob("*.py")},
        **{PACKAGE / f.relative_to(ROOT): f for f in (ROOT / "kernels").rglob("*.py")},
    }
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): f for p, f in files.items()}


@pytest.fixture(scope="module", params=["direct", "sdist"])
def wheel(request: pytest.FixtureRequest, built: Built) -> Path:
    return getattr(built, request.param)


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_one_top_level_name(wheel: Path) -> None:
    assert {name.split("/")[0] for name in contents(wheel)} == {PACKAGE}


def test_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    """Whatever lies in the source folders, data too: `kernels.gpu.tuned_configs` reads a table beside itself."""
    folders = {ROOT / PACKAGE: PACKAGE, ROOT / "kernels": f"{PACKAGE}/kernels", ROOT / "bench": f"{PACKAGE}/bench"}
    expected = {
        f"{target}/{path.relative_to(folder).as_posix()}"
        for folder, target in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", "results"} & {*path.parts}
    }
    assert {f"{PACKAGE}/kernels/gpu/tuned_configs.json", f"{PACKAGE}/py.typed"} < expected
    assert contents(wheel) == expected


def test_wheel_states_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name.split("/", 1)[1]: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(files["METADATA"]).decode()
        scripts = archive.read(files["entry_points.txt"]).decode()
    assert "licenses/LICENSE" in files
    for need in ("torch>=2.11", "numba>=", "triton>=3.6; platform_system"):
        assert f"Requires-Dist: {need}" in metadata
    assert "matmul-grad = matmul_grad.cli:main" in scripts


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(built: Built) -> None:
    """Byte by byte, so that what is installed below is both."""
    direct, sdist = (zipfile.ZipFile(path) for path in (built.direct, built.sdist))
    with direct, sdist:
        assert {*direct.namelist()} == {*sdist.namelist()}
        for name in direct.namelist():
            assert direct.read(name) == sdist.read(name), name


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed beside a package that owns the name `kernels`."""
    target = tmp_path_factory.mktemp("installed")
    (target / "kernels").mkdir()
    (target / "kernels" / "__init__.py").write_text("owner = 'somebody else'\n")
    install(built.direct, target)
    return target


def test_lives_beside_the_package_named_kernels(installed: Path, tmp_path: Path) -> None:
    code = """
import json, kernels, matmul_grad, matmul_grad.kernels.cpu, matmul_grad.kernels.gpu
modules = matmul_grad, matmul_grad.kernels.cpu, matmul_grad.kernels.gpu, kernels
print(json.dumps([kernels.owner, [module.__file__ for module in modules]]))
"""
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    owner, files = json.loads(output)
    assert owner == "somebody else"
    assert [Path(file) for file in files] == [
        installed / PACKAGE / "__init__.py",
        installed / PACKAGE / "kernels/cpu/__init__.py",
        installed / PACKAGE / "kernels/gpu/__init__.py",
        installed / "kernels" / "__init__.py",
    ]


def test_checkout_does_not_shadow_the_package_named_kernels(installed: Path) -> None:
    code = "import kernels; print(kernels.owner)"
    assert run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(installed)) == "somebody else\n"


# Nothing but what lies on sys.path: the finder of an editable installation would fill in what a wheel lacks.
WITHOUT_EDITABLE = """
import sys
def is_editable(finder):
    return getattr(finder, "__module__", "").startswith("__editable__")
sys.meta_path[:] = [finder for finder in sys.meta_path if not is_editable(finder)]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
"""
USE = """
import importlib.util, json, sys
import torch, matmul_grad
a, b = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)
assert torch.equal(matmul_grad.mm(a, b), a @ b)
with matmul_grad.strict():
    torch.testing.assert_close(matmul_grad.linear(a, b.t()), a @ b)
from matmul_grad import cli
assert cli.main(["info"]) == 0
(found,) = matmul_grad.bench.compare(matmul_grad.mm, torch.mm, [(8, 8, 8)], seconds=0.0)
import matmul_grad.bench.commands, matmul_grad.bench.gpu_report, matmul_grad.bench.tune
if importlib.util.find_spec("triton"):
    from matmul_grad.kernels.gpu import choose, config, launch
    problem = config.Problem(64, 64, 64, "bfloat16", "N", "N")
    assert choose.choose(problem, config.Target(90, 132, 232448)).block_m > 0
    assert torch.equal(launch.mm(a, b), a @ b)  # the plan, the launch and the kernel, by Triton's interpreter
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "matmul_grad"]
print(json.dumps([file for file in files if file]))
"""


def used(cwd: Path, *path: Path, before: str = WITHOUT_EDITABLE) -> set[Path]:
    """Multiply on the CPU, and through the GPU's plans, in a new process: the folders that its modules came from."""
    output = run(
        sys.executable, "-c", before + USE, cwd=cwd, PYTHONPATH=os.pathsep.join(map(str, path)), TRITON_INTERPRET="1",
        MATMUL_GRAD_TUNED=str(cwd / "none.json"),
    )  # fmt: skip
    return {Path(file).parent for file in json.loads(output.splitlines()[-1])}


def test_wheel_multiplies_and_chooses_tiles(installed: Path, tmp_path: Path) -> None:
    folders = used(tmp_path, installed)
    assert all(folder.is_relative_to(installed / PACKAGE) for folder in folders)
    assert {installed / PACKAGE / part for part in ("bench", "kernels/cpu", "kernels/gpu")} < folders


def test_bare_checkout_multiplies_and_chooses_tiles(built: Built, tmp_path: Path) -> None:
    """Nothing is installed; the checkout's folder is on the path."""
    folders = used(tmp_path, built.copy)
    assert all(folder.is_relative_to(built.copy) for folder in folders)
    assert {built.copy / part for part in ("bench", "kernels/cpu", "kernels/gpu")} < folders


def test_import_inside_the_checkout_beside_an_installation(built: Built, installed: Path) -> None:
    """Python puts the working folder first, so package and kernels are the checkout's."""
    code = """
import importlib.util, sys
for name in ("matmul_grad", "matmul_grad.kernels.cpu.gemm", "matmul_grad.kernels.gpu.plan", "matmul_grad.bench.tune"):
    print(importlib.util.find_spec(name).origin)
"""
    files = run(sys.executable, "-c", WITHOUT_EDITABLE + code, cwd=built.copy, PYTHONPATH=str(installed)).split()
    assert len(files) == 4 and all(Path(file).is_relative_to(built.copy) for file in files)


def test_editable_installation_multiplies_and_chooses_tiles(built: Built, tmp_path: Path) -> None:
    target = tmp_path / "editable"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--target", target, "--editable", built.copy, cwd=tmp_path)
    before = f"{WITHOUT_EDITABLE}\nimport site\nsite.addsitedir({str(target)!r})\n"
    folders = used(tmp_path, target, before=before)
    assert all(folder.is_relative_to(built.copy) for folder in folders)
    assert {built.copy / part for part in ("bench", "kernels/cpu", "kernels/gpu")} < folders


def test_import_brings_in_no_compiler(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import matmul_grad
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    new = set(processes.run(code, folder=tmp_path).stdout.split())
    assert PACKAGE in new
    assert not new & {"numba", "llvmlite", "triton"}


def test_modules_that_the_docs_name_are_attributes(tmp_path: Path) -> None:
    """After `import matmul_grad` alone; none of them is loaded before it is used."""
    code = """
import sys, matmul_grad
names = "bench", "reference", "testing"
assert not [name for name in names if f"matmul_grad.{name}" in sys.modules]
assert {*names} <= {*dir(matmul_grad)}
assert callable(matmul_grad.bench.compare) and callable(matmul_grad.reference.gradients)
assert callable(matmul_grad.testing.assert_within_budget)
assert not {"matplotlib", "rich"} & {*sys.modules}
try:
    matmul_grad.no_such_name
except AttributeError as error:
    print(error)
"""
    done = processes.run(code, folder=tmp_path)
    assert (done.stdout, done.stderr) == ("module 'matmul_grad' has no attribute 'no_such_name'\n", "")


def test_import_costs_a_tenth_of_torch_at_most(tmp_path: Path) -> None:
    """In time of the processor, beside torch's import: on any machine, however busy."""
    code = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
    of_torch = float(run(sys.executable, "-c", code.format("torch"), cwd=tmp_path))
    shares = [float(processes.run(code.format(PACKAGE), folder=tmp_path).stdout) / of_torch for _ in range(3)]
    print(f"import {PACKAGE} after torch: {statistics.median(shares):.3f} of torch's import")
    assert statistics.median(shares) <= 0.1, f"import {PACKAGE} took {shares} of torch's import"


def imported(module: str, source: str, package: bool) -> Iterator[str]:
    """The absolute names that a module's source imports, wherever in it the import stands."""
    inside = module if package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside.split(".")[: len(inside.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [base, node.module]))
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            (name, *rest) = node.args
            if module == PACKAGE and ast.unparse(name) == "f'{__name__}.{name}'":
                continue  # when it is first used: `test_modules_that_the_docs_name_are_attributes`
            if module.startswith("tests.") and not isinstance(name, ast.Constant):
                continue  # a test may walk over the package's modules by name
            assert not rest and isinstance(name, ast.Constant), f"{module}: {ast.unparse(node)}: use one literal"
            yield name.value


@functools.cache
def graph() -> dict[str, set[str]]:
    """Each module of the package with the modules of the package that it names in an import."""
    known = sources()

    def resolved(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]

    edges: dict[str, set[str]] = {}
    for module, path in known.items():
        names = imported(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        edges[module] = {resolved(name) for name in names if name.split(".")[0] == PACKAGE} - {module}
    unknown = {name for names in edges.values() for name in names} - set(known)
    assert not unknown, f"imported, but there is no such module: {unknown}"
    return edges


def reached(start: str) -> set[str]:
    edges, found, ahead = graph(), set[str](), [start]
    while ahead:
        for name in edges[ahead.pop()] - found:
            found.add(name)
            ahead.append(name)
    return found


@pytest.mark.parametrize(
    ("module", "package", "source", "names"),
    [
        ("matmul_grad.api", False, "from . import ops", ["matmul_grad.ops"]),
        ("matmul_grad.api", False, "from .kernels.cpu import gemm", ["matmul_grad.kernels.cpu.gemm"]),
        ("matmul_grad.kernels.cpu.gemm", False, "from ...ops import mm", ["matmul_grad.ops.mm"]),
        ("matmul_grad.kernels.cpu", True, "from ..gpu import gemm", ["matmul_grad.kernels.gpu.gemm"]),
        (
            "matmul_grad.kernels.cpu",
            True,
            "from .gemm import x, y",
            [f"{KERNELS}.cpu.gemm.{x}" for x in "xy"],
        ),
        ("matmul_grad.ops", False, "def f():\n    import matmul_grad.api as api", ["matmul_grad.api"]),
        ("matmul_grad.ops", False, "importlib.import_module('matmul_grad.api')", ["matmul_grad.api"]),
    ],
)
def test_imports_are_seen(module: str, package: bool, source: str, names: list[str]) -> None:
    assert list(imported(module, source, package)) == names


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_kernels_import_only_their_own_package(device: str) -> None:
    home = f"{KERNELS}.{device}"
    for module, names in graph().items():
        if module.startswith(home):
            strays = {name for name in names if name != home and not name.startswith(f"{home}.")}
            assert not strays, f"{module} imports {strays}"


@pytest.mark.parametrize("layer", TORCH_SIDE)
def test_torch_side_never_reaches_up(layer: str) -> None:
    assert f"{PACKAGE}.{layer}" in sources()
    above = {f"{PACKAGE}.{name}" for name in TORCH_SIDE[TORCH_SIDE.index(layer) + 1 :]}
    up = reached(f"{PACKAGE}.{layer}") & (above | {PACKAGE})
    assert not up, f"{layer} imports, through others or not, {up}"


def test_no_module_imports_itself_through_others() -> None:
    assert not [module for module in graph() if module in reached(module)]


def test_only_ops_reaches_into_the_kernels() -> None:
    """The layers above say which product; ops alone says on which kernel."""
    for layer in (*TORCH_SIDE[1:], "autocast", "vmap"):
        strays = {name for name in graph()[f"{PACKAGE}.{layer}"] if name.startswith(f"{KERNELS}.")}
        assert not strays, f"{layer} imports {strays}"


def test_nothing_imports_the_name_kernels() -> None:
    others = [file for folder in ("tests", "examples") for file in (ROOT / folder).rglob("*.py")]
    files = sources() | {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in others}
    for module, path in files.items():
        names = imported(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
        assert "kernels" not in {name.split(".")[0] for name in names}, path
