"""The work of the suite by folder, counted and held to tests/budget.json: tests, Python processes, compilations.

Counts instead of seconds, so that a suite that does twice the work fails, and a slow or busy machine does not. A run of
a part of the suite counts less than the whole and so stays within the budget. Tests marked slow do not count.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

COUNTED = ("tests", "processes", "compilations")


class Work:
    """Counts what the tests of this process do, under ``folder: kind``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.counts: Counter[str] = Counter()
        self.folder: str | None = None  # of the test that runs
        sys.addaudithook(self._see)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.folder = None if item.get_closest_marker("slow") else folder_of(item.path, self.root)
        self._add("tests")
        yield
        self.folder = None

    def _add(self, kind: str) -> None:
        if self.folder is not None:
            self.counts[f"{self.folder}: {kind}"] += 1

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and is_python(arguments[0], arguments[1]):
            self._add("processes")
        elif event == "import":
            self._watch_compiler()

    def _watch_compiler(self) -> None:
        """The handler that calls torch.compile's callbacks is wrapped: a reset forgets the callbacks themselves."""
        module = sys.modules.get("torch._dynamo.callback")
        handler = getattr(module, "CompilationCallbackHandler", None)
        start = getattr(handler, "run_start_callbacks", None)
        if start is not None and not hasattr(start, "__wrapped__"):
            handler.run_start_callbacks = self._counting(start)  # type: ignore[union-attr]  # not None: it has a start

    def _counting(self, start: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(start)
        def counted(handler: Any, compiled: Any) -> Any:
            if compiled.callback_trigger.name == "DYNAMO":  # a backward compiled late is not where a cache holds it
                self._add("compilations")
            return start(handler, compiled)

        return counted


def folder_of(path: Path, root: Path) -> str:
    """The folder of tests/ that holds a file, "." for the files in tests/ itself."""
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    return parts[0] if len(parts) > 1 else "."


def is_python(executable: Any, arguments: Any) -> bool:
    first = executable or (arguments if isinstance(arguments, str) else arguments[0])
    return "python" in Path(str(first)).name or str(first) == sys.executable


def exceeded(counts: Counter[str], budget: dict[str, dict[str, int]]) -> list[str]:
    """What is above the budget, a line each; nothing where there is no budget."""
    if not budget:
        return []
    lines = []
    for folder, allowed in sorted(budget.items()):
        for kind in COUNTED:
            if (done := counts[f"{folder}: {kind}"]) > allowed[kind]:
                lines.append(f"tests/{folder}: {done} {kind}, and its budget in tests/budget.json is {allowed[kind]}")
    known = {f"{folder}: {kind}" for folder in budget for kind in COUNTED}
    return lines + [f"tests/{name}: no budget in tests/budget.json" for name in sorted(set(counts) - known)]


def summary(counts: Counter[str]) -> str:
    folders = sorted({name.partition(":")[0] for name in counts})
    return "; ".join(f"{x}: " + ", ".join(f"{counts[f'{x}: {kind}']} {kind}" for kind in COUNTED) for x in folders)


def load(root: Path) -> dict[str, dict[str, int]]:
    path = root / "budget.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
