"""What the documents say runs: python blocks of the pages, examples of the docstrings, generated figures."""

import doctest
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import matmul_grad
from matmul_grad.bench import readme, results

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "docs" / "results.md"
MODULES = [
    "matmul_grad",
    *(f"matmul_grad.{path.stem}" for path in sorted((ROOT / "matmul_grad").glob("[!_]*.py"))),
    *(
        f"matmul_grad.bench.{path.stem}"
        for path in sorted((ROOT / "bench").glob("[!_]*.py"))
        if path.name not in ("conftest.py", "test_mm.py")
    ),
    "matmul_grad.kernels.cpu.config",
    "matmul_grad.kernels.cpu.host",
    "matmul_grad.kernels.cpu.microkernel",
]


def snippets(page: Path) -> list[tuple[int, str]]:
    """(line, source) of each python block."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


SNIPPETS = [(page, line, source) for page in PAGES for line, source in snippets(page)]


@pytest.mark.parametrize(
    ("page", "line", "source"), SNIPPETS, ids=[f"{page.name}-{line}" for page, line, _ in SNIPPETS]
)
def test_snippet_runs(page: Path, line: int, source: str) -> None:
    code = compile("\n" * line + source, str(page), "exec")
    exec(code, {"__name__": "snippet"})


def test_pages_have_snippets() -> None:
    assert snippets(ROOT / "README.md") and len(snippets(ROOT / "docs" / "howto" / "use-in-a-model.md")) >= 3


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in doctest.DocTestFinder().find(module, name):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def public_functions(module: ModuleType) -> dict[str, object]:
    """Of the package itself its classes too."""
    named = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
    wanted = callable if module is matmul_grad else inspect.isfunction
    return {name: value for name, value in named.items() if wanted(value)}


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_have_an_example(name: str) -> None:
    functions = public_functions(importlib.import_module(name))
    bare = [name for name, function in functions.items() if ">>>" not in (inspect.getdoc(function) or "")]
    assert not bare, f"{name}: no example in the docstring of {', '.join(bare)}"


def test_public_functions_are_found() -> None:
    assert set(public_functions(matmul_grad)) == set(matmul_grad.__all__) >= {"mm", "strict", "Linear", "convert"}


def test_a_public_function_without_an_example_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def function() -> None:
        """No example."""

    monkeypatch.setattr(matmul_grad, "mm", function)
    monkeypatch.setattr(matmul_grad, "Linear", type("Class", (), {"__doc__": "No example."}))
    with pytest.raises(AssertionError, match="Linear, mm"):
        test_public_functions_have_an_example("matmul_grad")


def test_results_come_from_kept_rows() -> None:
    """The section between the markers is what the bench writes from a file of bench/results."""
    page = RESULTS.read_text(encoding="utf-8")
    shown = page.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    kept = (ROOT / "bench" / "results").glob(f"*/{results.BENCH}.json")
    written = [
        readme.block(json.loads(path.read_text(encoding="utf-8")), readme.beside(path.parent, RESULTS)) for path in kept
    ]
    assert shown in written
