"""Decompositions of this package's operators into aten's, for ``ExportedProgram.run_decompositions``.

    matmul_grad.mm, bmm, addmm, baddbmm    aten's operator of the same name
    matmul_grad.scaled_mm                  aten._scaled_mm
    matmul_grad.addmm_activation           aten.addmm or mm, and the activation
    matmul_grad.addmm_gated                two of these, and a multiplication
    matmul_grad.convolution                aten.convolution, and its gradient of the filter aten.convolution_backward

Consumers of exported graphs (ONNX, back ends, quantisers) know aten's. Inductor, whose table is made from the same
default, keeps the operators, so that compiled code runs on these kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import convolution_by_torch
from .activations import addmm_activation_by_torch
from .gated import addmm_gated_by_torch
from .import_hooks import on_import
from .ops import SCHEMAS, scaled_mm_by_torch, torch_impl_of

EXPORT = ("torch.export.exported_program", "torch.export")
INDUCTOR = "torch._inductor.decomposition"
DEFAULT = "default_decompositions"


def aten_decompositions() -> dict[Any, Callable[..., Any]]:
    """By operator, a function that computes it with aten's."""
    operators = torch.ops.matmul_grad
    products = {getattr(operators, name).default: torch_impl_of(name) for name in SCHEMAS}
    activated = {
        operators.addmm_activation.default: addmm_activation_by_torch,
        operators.addmm_gated.default: addmm_gated_by_torch,
    }
    convolutions = {
        operators.convolution.default: convolution_by_torch.convolution,
        operators.convolution_weight_gradient.default: convolution_by_torch.weight_gradient,
    }
    return products | activated | convolutions | {operators.scaled_mm.default: scaled_mm_by_torch}


def register() -> None:
    """Add them to torch's default table for export, and take them out of Inductor's."""
    for name in EXPORT:
        on_import(name, _extend)
    on_import(INDUCTOR, _leave_out)


def _extend(module: ModuleType) -> None:
    default = getattr(module, DEFAULT, None)
    if default is None or hasattr(default, "__wrapped__"):
        return

    @functools.wraps(default)
    def default_decompositions() -> Any:
        found = default()
        for operator, decomposition in aten_decompositions().items():
            found[operator] = decomposition
        return found

    setattr(module, DEFAULT, default_decompositions)


def _leave_out(inductor: ModuleType) -> None:
    for operator in aten_decompositions():
        getattr(inductor, "decompositions", {}).pop(operator, None)
