"""The site: it builds without a warning, docstrings become Markdown, formulas become MathML."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import scaled
from scripts import ROOT, load

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")

FACTS = """Product of two matrices.

C = A · B

shapes      a (m, k), b (k, n)
            → (m, n)
rounding    once | at the store

Prose about x = 1.

>>> 1 + 1
2
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=scaled(300))
    assert done.returncode == 0, done.stderr
    return folder


def read(site: Path, page: str) -> str:
    return (site / page).read_text(encoding="utf-8")


def test_every_public_function_has_its_reference(site: Path) -> None:
    import matmul_grad

    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    missing = [name for name in matmul_grad.__all__ if f'.{name}"' not in pages]
    assert not missing


def test_facts_of_a_docstring_are_a_table(site: Path) -> None:
    assert "<td>shapes</td>" in read(site, "reference/functions.html")


@pytest.mark.parametrize("name", ["derivation", "convolution", "transposed-convolution"])
def test_every_formula_is_mathml(site: Path, name: str) -> None:
    page = read(site, f"{name}.html")
    formulas = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").count("```math")
    assert page.count('<div class="formula"') == formulas >= 18
    assert not re.search(r"\\[a-z]", page), "a command of TeX"


def test_nothing_is_read_from_the_network(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if not page.is_relative_to(site / "bench")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text and 'rel="stylesheet" href="http' not in text, page


def test_a_docstring_as_markdown() -> None:
    assert load("docs/tools/docstrings.py").markdown(FACTS) == "\n".join(
        [
            "Product of two matrices.", "", "```text", "C = A · B", "```", "", "| | |", "|---|---|",
            "| shapes | a (m, k), b (k, n) → (m, n) |", "| rounding | once \\| at the store |", "",
            "Prose about x = 1.", "", "```pycon", ">>> 1 + 1", "2", "```",
        ]
    )  # fmt: skip


def test_a_formula_as_mathml() -> None:
    tools = load("docs/tools/mkdocs_hooks.py")
    page = tools.on_page_markdown("Of $x$:\n\n```math\ny = x \\tag{D9}\n```\n")
    assert page.startswith("Of <math") and "$" not in page
    assert '<div class="formula" id="D9"><math' in page and "<span>(D9)</span></div>" in page


def test_dollars_of_pages_without_formulas_stay() -> None:
    assert load("docs/tools/mkdocs_hooks.py").on_page_markdown("`$A` and `$B`") == "`$A` and `$B`"
