"""Callbacks for the import of modules of torch that cost more to import than this package and may never be needed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], None]

_waiting: dict[str, list[Then]] = {}


def on_import(name: str, then: Then) -> None:
    """Call ``then(module)`` once: now where the module is imported already, else at the end of its import."""
    if (module := sys.modules.get(name)) is not None:
        then(module)
        return
    _waiting.setdefault(name, []).append(then)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _imported(module: ModuleType) -> None:
    for then in _waiting.pop(module.__name__, []):
        then(module)
    if not _waiting and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules that callbacks wait for, and calls them after the import; removed when none waits."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in _waiting else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _imported(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this one loader, once
        return spec


_finder = _Finder()
