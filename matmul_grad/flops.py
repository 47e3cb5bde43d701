"""FLOP formulas for torch's FlopCounterMode, registered when its module is imported, since that imports triton."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .import_hooks import on_import

COUNTER = "torch.utils.flop_counter"


def count_flops(packet: Any, formula: Callable[..., int]) -> None:
    """Make FlopCounterMode count ``packet`` by ``formula(*shapes)``, without its keyword arguments."""

    def shapes_only(*shapes: Any, **_: Any) -> int:
        return formula(*shapes)

    def register(counter: ModuleType) -> None:
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet)(shapes_only)

    on_import(COUNTER, register)
