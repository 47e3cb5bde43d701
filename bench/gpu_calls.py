"""This package's launcher, which `gpu-report` and `tune` use beside the public functions.

The launcher imports Triton, so each function imports it when it is called, not before.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..kernels.gpu.config import Problem, Target, TileConfig


def mm(precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The launcher's product, in precisions that are not torch's setting here."""
    from ..kernels.gpu import launch

    return lambda a, b: launch.mm(a, b, precision)


def mm_backward(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients, in one launch where that is possible."""
    from ..kernels.gpu import launch

    return launch.mm_backward(grad, a, b)


def convolutions() -> dict[str, Callable[..., Tensor]]:
    """A convolution and its gradients, by the names of the products."""
    from ..kernels.gpu import convolution

    functions = convolution.forward, convolution.input_gradient, convolution.weight_gradient
    return dict(zip(("forward", "dgrad", "wgrad"), functions, strict=True))


def describe(a: Tensor, b: Tensor, precision: str) -> tuple[Problem, Target]:
    """The problem and the target that ``choose`` is asked about for this product."""
    from ..kernels.gpu import launch

    c = a.new_empty((*a.shape[:-1], b.shape[-1]))
    return launch.describe(a, b, c, precision), launch.target_of(a)


def with_config(a: Tensor, b: Tensor, precision: str, config: TileConfig) -> Tensor:
    from ..kernels.gpu import launch

    return launch.mm(a, b, precision, config=config)
