"""FLOP formulas for torch's FlopCounterMode, handed over when that module is first imported.

``torch.utils.flop_counter`` imports triton, which costs more than the whole of this package.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
_formulas: dict[Any, Callable[..., int]] = {}


def count_flops(packet: Any, formula: Callable[..., int]) -> None:
    """Make FlopCounterMode count ``packet`` as ``formula(*shapes)`` says, whatever it was called with by name."""
    _formulas[packet] = formula
    counter = sys.modules.get(COUNTER)
    if counter is not None:
        _hand_over(counter)
    elif _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _hand_over(counter: ModuleType) -> None:
    for packet, formula in _formulas.items():
        if packet not in counter.flop_registry:

            def shapes_only(*shapes: Any, _formula: Callable[..., int] = formula, **_: Any) -> int:
                return _formula(*shapes)

            counter.register_flop_formula(packet)(shapes_only)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the counter as everyone does, and adds a step after its import; then it is gone."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _hand_over(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this one loader, once
        return spec


_finder = _Finder()
