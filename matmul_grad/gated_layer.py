"""The gated linear layer as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .activation_formulas import require_name
from .gated import gated_linear


class GatedLinear(nn.Module):
    """A linear layer times the activation of another one, by ``matmul_grad.gated_linear``.

    C = activation(A · Gᵀ + gate_bias) · (A · Wᵀ + bias)

    Parameters ``weight`` and ``gate_weight`` (out_features, in_features), ``bias`` and ``gate_bias`` (out_features) or
    None, each as ``torch.nn.Linear`` begins with. ``activation`` is one that ``matmul_grad.linear`` takes.

    >>> import torch, matmul_grad
    >>> layer = matmul_grad.GatedLinear(3, 2, bias=False)
    >>> layer, layer(torch.ones(5, 3)).shape
    (GatedLinear(in_features=3, out_features=2, bias=False, activation='silu'), torch.Size([5, 2]))
    """

    bias: Tensor | None
    gate_bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: str = "silu",
    ) -> None:
        require_name(activation)
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **made))
        self.gate_weight = nn.Parameter(torch.empty(out_features, in_features, **made))
        for name in ("bias", "gate_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(out_features, **made)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return gated_linear(input, self.weight, self.gate_weight, self.bias, self.gate_bias, self.activation)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, activation={self.activation!r}"
