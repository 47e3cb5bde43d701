"""The how-to pages, followed: what they name exists, and an addition that does what they say works.

tests/integration/test_docs_names.py resolves all files and names of these pages; here the steps themselves are taken.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT
from torch import Tensor

from matmul_grad import cli, testing
from matmul_grad.bench import backends, correctness, inputs
from matmul_grad.bench.backends import call_of, products_of
from matmul_grad.bench.workloads import Workload
from matmul_grad.kernels.cpu import config, driver, gemm_args, host, schedule
from matmul_grad.kernels.native import broadcast, call, direct, gradients

HOWTO = ROOT / "docs" / "howto"
ADDITIONS = sorted(HOWTO.glob("add-*.md"))
REFERENCE = ROOT / "docs" / "reference" / "command-line.md"


def test_there_is_a_page_for_each_addition() -> None:
    subjects = ["a-benchmark", "a-kernel", "a-torch-version", "an-epilogue", "an-instruction-set"]
    assert [page.stem.removeprefix("add-") for page in ADDITIONS] == subjects


@pytest.mark.parametrize("page", ADDITIONS, ids=lambda page: page.stem)
def test_a_page_names_files_to_touch(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"files to touch", text, re.IGNORECASE)
    listed = re.findall(r"^\* `([\w./-]+)`", text, re.MULTILINE)
    assert len(listed) >= 4
    assert not (missing := [path for path in listed if not (ROOT / path).exists()]), missing


def test_an_instruction_set_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1 to 3: a name, a tile of its own, and code for this processor."""
    best = host.cpu()
    tile = (2, 2, config.TILES[best.isa][2])
    for module in (config, host):
        monkeypatch.setattr(module, "ISAS", (*config.ISAS, "made_up"))
    monkeypatch.setitem(config.TILES, "made_up", tile)
    detected = host.host_isas()
    monkeypatch.setattr(host, "host_isas", lambda: (*detected, "made_up"))
    monkeypatch.setitem(host.BASELINES, "made_up", host.BASELINES.get(best.isa, "x86-64-v4"))
    block = config.choose("float32", dataclasses.replace(host.cpu("made_up"), fused=best.fused))
    assert block.name == f"sgemm_made_up_2x{block.nr}"
    for (m, n, k), layout in itertools.product(((1, 1, 1), (2, 9, 4), (5, 40, 33), (7, 65, 130)), testing.LAYOUTS):
        a, b = (testing.integers(*shape, torch.float32) for shape in ((m, k), (k, n)))
        a = a.t().contiguous().t() if layout[0] == "T" else a
        b = b.t().contiguous().t() if layout[1] == "T" else b
        out = torch.full((m, n), float("nan"))
        direct.multiply(block, a, b, out, 1)
        testing.assert_same_bits(out, testing.exact_product(a, b), f"{layout} {m}x{n}x{k}")
    assert driver.config("float32").isa == best.isa


def words_not_set_by(*sources: Any) -> set[str]:
    """The arguments of the driver that no line of ``sources`` sets."""
    numbers = {name: value for name, value in vars(gemm_args).items() if isinstance(value, int) and name.isupper()}
    words = {name for name in numbers if name not in ("GEMM_ARGS", "ONE")}
    assert sorted(numbers[name] for name in words) == list(range(gemm_args.GEMM_ARGS))
    return words - set(re.findall(r"put\(args, (\w+),", "".join(inspect.getsource(source) for source in sources)))


def test_every_argument_of_the_driver_is_set() -> None:
    """The words are memory of the stack, which nobody clears: one that is not set is whatever was there.

    Left out are those that nothing reads without a source, or of one product that is no batch.
    """
    plain = schedule.set_plain_store.py_func
    assert words_not_set_by(call, plain) == {"BETA"}
    assert all("set_plain_store(args)" in inspect.getsource(module) for module in (call, broadcast, schedule))
    gradient = gradients.set_product.py_func, schedule.set_dense_c.py_func, plain
    assert words_not_set_by(*gradient) == {"BETA", "S_RS", "S_CS", "S_BS"}


class Einsum(backends.Bare):
    """A backend of a few lines."""

    def product(self, x: Tensor, y: Tensor) -> backends.Call:
        if x.dtype == torch.float64:
            raise backends.Skipped("float32 only")
        return lambda: torch.einsum("ij,jk->ik", x, y)

    def tensor(self, result: Tensor) -> Tensor:
        return result


def test_a_backend_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    added = backends.Backend("einsum", "torch", "torch", Einsum, dtypes=("f32", "f64"))
    monkeypatch.setattr(backends, "ALL", (*backends.ALL, added))
    assert added in backends.chosen(["einsum"], "cpu")
    library = added.library()
    for product in (*testing.PRODUCTS, "step"):
        workload = Workload(product, "f32", "NN", 7, 5, 9)
        assert added.takes(workload)
        whole = inputs.draw(workload, "integers")
        for which, result in products_of(library, workload, call_of(library, workload, whole)()).items():
            correctness.assert_exact(result, *whole.of(which), which)
    with pytest.raises(backends.Skipped, match="float32 only"):
        library.product(torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))


def documented_options() -> list[tuple[str, str]]:
    rows = re.findall(r"^\| `matmul-grad ([\w ]+)` \| (`--.*?) \|", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(command, option) for command, cell in rows for option in re.findall(r"--[\w-]+", cell)]


@pytest.mark.parametrize(("command", "option"), documented_options())
def test_a_documented_option_exists(command: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0 and re.search(rf"{option}\b", capsys.readouterr().out)


def test_options_are_documented() -> None:
    assert ("bench", "--suite") in documented_options() and ("bench report", "--readme") in documented_options()


def test_every_variable_of_the_environment_is_documented() -> None:
    folders = ("matmul_grad", "kernels", "bench")
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"MATMUL_GRAD_[A-Z_]+", text)}
    assert names == set(re.findall(r"`(MATMUL_GRAD_[A-Z_]+)`", REFERENCE.read_text(encoding="utf-8")))
