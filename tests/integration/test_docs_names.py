"""Every file and every name that the documents put in back-ticks exists, and every relative link leads somewhere."""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Where a module that is named without its package lies.
PACKAGES = {
    "matmul_grad": "matmul_grad",
    "kernels/cpu": "matmul_grad.kernels.cpu",
    "kernels/gpu": "matmul_grad.kernels.gpu",
    "kernels/native": "matmul_grad.kernels.native",
    "bench": "matmul_grad.bench",
    "tests/helpers": "",
}
OTHERS = {"torch": "torch", "numpy": "numpy", "numba": "numba", "nn": "torch.nn", "functional": "torch.nn.functional"}
SUFFIXES = (".py", ".md", ".json", ".toml", ".txt", ".yml", ".yaml", ".svg", ".css", ".cff", ".ipynb", ".csv", ".html")
# Back-ticked words that look like names or files of this project and are none.
ELSEWHERE = {
    "bench.csv", "bench.html", "bench.json", "bench.md", "bench-unfinished.json",  # what a run of the bench writes
    "module.forward",  # of any module
    "model.pt",
}  # fmt: skip
NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?:\(.*\))?")
PATH = re.compile(r"[\w.@-]+(?:/[\w.@<>*-]+)*/?")


class Mention(NamedTuple):
    page: str
    line: int
    text: str


@functools.cache
def tracked() -> tuple[str, ...]:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return tuple(listed.stdout.splitlines())
    return tuple(str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file())


def prose(page: Path) -> list[str]:
    """The lines of a page, empty where a block of code is."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^ *```.*?^ *```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    return ["" if re.match(r"    \S", line) else line for line in text.splitlines()]


def mentions(page: Path) -> list[Mention]:
    lines = enumerate(prose(page), 1)
    name = str(page.relative_to(ROOT))
    return [Mention(name, number, text) for number, line in lines for text in re.findall(r"`([^`]+)`", line)]


def is_path(text: str) -> bool:
    return bool(PATH.fullmatch(text)) and (text.endswith(SUFFIXES) or text.partition("/")[0] in top_folders())


@functools.cache
def top_folders() -> frozenset[str]:
    return frozenset(path.partition("/")[0] for path in tracked() if "/" in path)


def path_exists(text: str) -> bool:
    """A path from the root, a folder, or the end of a path: `host.py` is `kernels/cpu/host.py`."""
    if "<" in text or "*" in text:
        parts = re.split(r"<[^>]*>|\*", text.rstrip("/"))
        pattern = re.compile("[^/]*".join(map(re.escape, parts)) + "(/.*)?")
        return any(pattern.fullmatch(path) for path in tracked())
    wanted = text.rstrip("/")
    return any(f"/{path}".endswith(f"/{wanted}") or path.startswith(f"{wanted}/") for path in tracked())


def name_exists(text: str) -> bool:
    """``module.attribute``, by its full name or from the module on."""
    first, *rest = text.split(".")
    found = [f"{package}.{first}".lstrip(".") for folder, package in PACKAGES.items() if has_module(folder, first)]
    found += [first] if first == "matmul_grad" else [OTHERS[first]] if first in OTHERS else []
    return any(has_attributes(module, rest) for module in found)


def has_module(folder: str, name: str) -> bool:
    return (ROOT / folder / f"{name}.py").is_file()


def has_attributes(module: str, names: list[str]) -> bool:
    """Whether ``module`` has the chain of ``names``, of which the first may be modules."""
    while names and is_module(f"{module}.{names[0]}"):
        module, names = f"{module}.{names[0]}", names[1:]
    if not is_module(module):
        return False
    value: Any = importlib.import_module(module)
    for name in names:
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def is_known(text: str) -> bool:
    """False for a file or a name of this project that does not exist; other text is none of this test's."""
    if text in ELSEWHERE:
        return True
    name = NAME.fullmatch(text)
    if is_path(text):
        return path_exists(text) or (name is not None and name_exists(name[1]))
    if name is None:
        return True
    first = name[1].partition(".")[0]
    is_ours = first == "matmul_grad" or first in OTHERS or any(has_module(folder, first) for folder in PACKAGES)
    return not is_ours or name_exists(name[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton, which modules import, is on Linux alone")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_in_backticks_exists(page: Path) -> None:
    unknown = [f"{found.page}:{found.line}: {found.text}" for found in mentions(page) if not is_known(found.text)]
    assert not unknown, "\n".join(unknown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_of_a_source_exists(page: Path) -> None:
    """In blocks of code too, and whether in back-ticks or not."""
    paths = re.findall(
        r"(?<![\w/.])(?:matmul_grad|kernels|bench|docs|tests|examples)/[\w/-]+\.\w+", page.read_text("utf-8")
    )
    assert not (missing := [path for path in paths if not (ROOT / path).is_file()]), missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    links = [link for line in prose(page) for link in re.findall(r"\]\(([^)\s]+)\)", line)]
    local = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert not missing, f"{page.name}: {', '.join(missing)}"


@pytest.mark.parametrize(
    "text",
    [
        "matmul_grad.no_such_function", "config.NO_SUCH_TABLE", "kernels/cpu/no_such_file.py", "no_such_page.md",
        "torch.no_such_function", "matmul_grad.kernels.cpu.no_such_module.name", "kernels/gpu/*.rs", "bench/<x>.rs",
    ],
)  # fmt: skip
def test_a_name_that_does_not_exist_is_found(text: str) -> None:
    assert not is_known(text)


@pytest.mark.parametrize(
    "text",
    [
        "matmul_grad.mm",
        "matmul_grad.kernels.cpu.config.TILES",
        "config.TILES",
        "host.py",
        "kernels/cpu/",
        "torch.mm(a)",
    ],
)
def test_a_name_that_exists_is_known(text: str) -> None:
    assert is_known(text)
