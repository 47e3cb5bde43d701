"""This package as `gpu-report` and `tune` see it: the one place that names what they use of it.

A part that this version does not have is ``Missing``: its rows say so, and the rest goes on.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import matmul_grad

Mm = Callable[[Tensor, Tensor], Tensor]


class Missing(Exception):
    """What is not there to be measured; the message says what."""


def mm(precision: str) -> Mm:
    """The public product, or for the precisions that are not torch's setting here, the launcher's."""
    if precision == "ieee":
        return lambda a, b: matmul_grad.mm(a, b)
    from ..kernels.gpu import launch

    return lambda a, b: launch.mm(a, b, precision)


def bmm() -> Mm:
    found = getattr(matmul_grad, "bmm", None) or getattr(_launch(), "bmm", None)
    if found is None:
        raise Missing("matmul_grad has no bmm")
    return found


def mm_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients by the launcher, in one launch where it has that."""
    found = getattr(_launch(), "mm_backward", None)
    if found is None:
        raise Missing("the launcher has no mm_backward")
    return found(grad, a, b)


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    mode = getattr(matmul_grad, "deterministic", None)
    if mode is None:
        raise Missing("matmul_grad has no deterministic()")
    with mode(batch_invariant=True):
        yield


def describe(a: Tensor, b: Tensor, precision: str) -> tuple[Any, Any]:
    """The problem and the target that ``choose`` is asked about for this product."""
    launch = _launch()
    target = launch.INTERPRETER if launch.INTERPRETED else launch.target_of(a.device.index)
    c = a.new_empty((a.shape[0], b.shape[1]))
    return launch.describe(a, b, c, precision), target


def choose(problem: Any, target: Any) -> Any:
    return _choosing().choose(problem, target)


def candidates(problem: Any, target: Any) -> list[Any]:
    """Every config worth timing for a problem."""
    found = getattr(_choosing(), "candidates", None)
    if found is None:
        raise Missing("there is no list of candidates")
    return list(found(problem, target))


def with_config(a: Tensor, b: Tensor, precision: str, config: Any) -> Tensor:
    return _launch().mm(a, b, precision, config=config)


def config_of(fields: dict[str, Any]) -> Any:
    return importlib.import_module("matmul_grad.kernels.gpu.config").TileConfig(**fields)


def kernel_name(problem: Any, config: Any) -> str:
    return str(importlib.import_module("matmul_grad.kernels.gpu.config").kernel_name(problem, config))


def key(problem: Any, target: Any) -> str:
    return str(_winners().key(problem, target))


def user_path() -> Path:
    return Path(_winners().user_path())


def _launch() -> Any:
    return importlib.import_module("matmul_grad.kernels.gpu.launch")


def _choosing() -> Any:
    try:
        return importlib.import_module("matmul_grad.kernels.gpu.choose")
    except ModuleNotFoundError:
        return importlib.import_module("matmul_grad.kernels.gpu.config")


def _winners() -> Any:
    try:
        return importlib.import_module("matmul_grad.kernels.gpu.winners")
    except ModuleNotFoundError:
        raise Missing("there is no table of winners") from None
