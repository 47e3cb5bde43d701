"""The workflow tests what pyproject.toml admits: each Python, each minor version of torch, and each system."""

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The jobs of ci.yml's matrix, as its rules expand it where each row of ``include`` is a job of its own."""
    jobs: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    (system,), (torch,) = matrix["os"], matrix["torch"]
    return [{"os": system, "python": python, "torch": torch} for python in matrix["python"]] + matrix["include"]


def test_no_two_jobs_are_the_same(rows: list[dict[str, str]]) -> None:
    assert len({tuple(sorted(row.items())) for row in rows}) == len(rows)


def test_each_python_is_tested(rows: list[dict[str, str]]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    admitted = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project))
    (lowest,) = re.findall(r'requires-python = ">=(3\.\d+)"', project)
    assert admitted | {lowest} <= {row["python"] for row in rows if row["os"] == "ubuntu-latest" and not row["torch"]}


def test_each_minor_version_of_torch_is_tested(rows: list[dict[str, str]]) -> None:
    (lowest,) = re.findall(r'"torch>=2\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned, minor = re.findall(r"^torch==(2\.(\d+)\.\d+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    tested = {row["torch"] for row in rows}
    assert pinned in tested
    minors = [int(version.split(".")[1]) for version in sorted(tested - {""})]
    assert minors == list(range(int(lowest), minors[-1] + 1))
    assert minors[-1] >= int(minor)


def test_each_system_is_tested(rows: list[dict[str, str]]) -> None:
    assert {row["os"].split("-")[0] + "-arm" * ("arm" in row["os"]) for row in rows} == {
        "ubuntu", "ubuntu-arm", "macos"
    }  # fmt: skip
