"""The table of supported versions: README shows what docs/support.json holds, and that comes from test reports."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[1]
WHERE = {"torch": "2.13.0", "triton": "3.7.1", "python": "3.11.7", "system": "Linux x86_64", "isa": "avx2"}
REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.op.test_nn" name="test_a[x.test_y]" />
<testcase classname="tests.op.test_nn" name="test_b"><failure message="no" /></testcase>
<testcase classname="tests.op.test_nn" name="test_c"><skipped message="no GPU" /></testcase>
<testcase classname="tests.kernels.cpu.test_gemm.TestOne" name="test_d"><error message="no" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def support() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_table", HERE / "support_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_results_kept(support: ModuleType) -> None:
    page, entries = support.README.read_text(encoding="utf-8"), support.load()
    assert support.with_table(page, entries) == page
    assert len(entries) >= 1


def test_a_report_becomes_a_row(support: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    (entry,) = support.add([], WHERE, "2026-01-02", tmp_path / "report.xml")
    gemm, nn = "tests.kernels.cpu.test_gemm", "tests.op.test_nn"
    assert entry["files"] == {
        gemm: {"passed": 0, "failed": 1, "skipped": 0, "failures": [f"{gemm}.TestOne.test_d"]},
        nn: {"passed": 1, "failed": 1, "skipped": 1, "failures": [f"{nn}.test_b"]},
    }
    row = support.table([entry]).splitlines()[2]
    assert row == "| 2.13.0 | 3.7.1 | 3.11.7 | Linux x86_64 | avx2 | 1 | 2 | 1 | 2 | 2026-01-02 |"


def test_a_later_report_replaces_its_own_files_alone(support: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "first.xml", tmp_path / "second.xml"
    first.write_text(REPORT)
    second.write_text('<testsuite><testcase classname="tests.op.test_nn" name="test_b" /></testsuite>')
    entries = support.add(support.add([], WHERE, "2026-01-02", first), WHERE, "2026-01-03", second)
    assert [list(entry["files"]) for entry in entries] == [["tests.kernels.cpu.test_gemm", "tests.op.test_nn"]]
    assert entries[0]["files"]["tests.op.test_nn"] == {"passed": 1, "failed": 0, "skipped": 0, "failures": []}
    assert entries[0]["date"] == "2026-01-03"


def test_a_file_that_has_gone_is_left_out(support: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "first.xml", tmp_path / "second.xml"
    first.write_text(REPORT.replace("op.test_nn", "test_gone"))
    second.write_text(REPORT)
    entries = support.add(support.add([], WHERE, "2026-01-02", first), WHERE, "2026-01-03", second)
    assert list(entries[0]["files"]) == ["tests.kernels.cpu.test_gemm", "tests.op.test_nn"]


def test_each_platform_has_a_row_in_the_order_of_versions(support: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    entries: list[object] = []
    for version in ("2.15.0+cu132", "2.9.1", "2.13.0"):
        entries = support.add(entries, WHERE | {"torch": version}, "2026-01-02", tmp_path / "report.xml")
    assert [row.split(" | ")[0] for row in support.table(entries).splitlines()[2:]] == [
        "| 2.9.1", "| 2.13.0", "| 2.15.0+cu132"
    ]  # fmt: skip


def test_this_platform_is_described(support: ModuleType) -> None:
    where = support.this_platform()
    assert tuple(where) == support.PLATFORM
    assert all(where.values())
