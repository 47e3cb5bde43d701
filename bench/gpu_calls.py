"""This package as `gpu-report` and `tune` see it: the one place that names what they use of it.

A part that this version does not have is ``Missing``: its rows say so, and the rest goes on. Triton is imported when a
product is made, not before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

import matmul_grad

from ..kernels.gpu import choose as choosing
from ..kernels.gpu import config, tuned_configs
from ..kernels.gpu.config import Problem, Target, TileConfig

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
    """The public product of batches where there is one, else the launcher's."""
    from ..kernels.gpu import launch

    return getattr(matmul_grad, "bmm", launch.bmm)


def mm_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients, in one launch where that is possible."""
    from ..kernels.gpu import launch

    return launch.mm_backward(grad, a, b)


def batch_invariant() -> AbstractContextManager[None]:
    return matmul_grad.deterministic(batch_invariant=True)


def describe(a: Tensor, b: Tensor, precision: str) -> tuple[Problem, Target]:
    """The problem and the target that ``choose`` is asked about for this product."""
    from ..kernels.gpu import launch

    c = a.new_empty((*a.shape[:-1], b.shape[-1]))
    return launch.describe(a, b, c, precision), launch.target_of(a)


def choose(problem: Problem, target: Target) -> TileConfig:
    return choosing.choose(problem, target)


def candidates(problem: Problem, target: Target) -> list[TileConfig]:
    """Every config worth timing for a problem."""
    return choosing.candidates(problem, target)


def with_config(a: Tensor, b: Tensor, precision: str, config: TileConfig) -> Tensor:
    from ..kernels.gpu import launch

    return launch.mm(a, b, precision, config=config)


def kernel_name(problem: Problem, tile: TileConfig) -> str:
    return config.kernel_name(problem, tile)


def key(problem: Problem, target: Target) -> str:
    """The name of a problem in the table of winners."""
    return tuned_configs.key(problem, target)


def user_path() -> Path:
    """The table that ``choose`` reads before the project's own."""
    return tuned_configs.user_path()
