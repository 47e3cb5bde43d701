"""This package's kernels as `gpu-report` and `tune` see them: the one place that names what they use of them.

Triton is imported when a product is made, not before.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..kernels.gpu import choose as choosing
from ..kernels.gpu import config, winners
from ..kernels.gpu.config import Problem, Target, TileConfig
from .backends import Mm


def mm(precision: str) -> Mm:
    """The launcher's product, in precisions that are not torch's setting here."""
    from ..kernels.gpu import launch

    return lambda a, b: launch.mm(a, b, precision)


def mm_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients, in one launch where that is possible."""
    from ..kernels.gpu import launch

    return launch.mm_backward(grad, a, b)


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
    return winners.key(problem, target)


def user_path() -> Path:
    """The table that ``choose`` reads before the project's own."""
    return winners.user_path()
