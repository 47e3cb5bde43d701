"""A model with every kind of layer that ``convert`` meets, and what is compared before and after."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import matmul_grad
from matmul_grad.layers import MARK


class Mlp(nn.Module):
    """Layers by names, in lists, without bias, one used twice, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU()) for _ in range(2)])
        self.again = self.first
        self.embedding = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.again(x[..., :6]))


NAMES = ["first", "blocks.0.0", "blocks.1.0", "head"]


def seeded(make: Callable[..., nn.Module], *arguments: Any, **named: Any) -> Any:
    torch.manual_seed(0)
    return make(*arguments, **named)


def step(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of every parameter."""
    model.zero_grad()
    c = model(*inputs)
    c.sin().sum().backward()
    return [c.detach(), *(x.grad for x in model.parameters())]


def strictly(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with matmul_grad.strict():
        return step(model, *inputs)


class counted(TorchDispatchMode):  # reads as the function of a block
    """The products of a block, by the names of their operators: this package's, and aten's."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []
        self.theirs: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().split("::")[1].split(".")[0]
        if operator.namespace == "matmul_grad":
            self.ours.append(name)
        elif name in ("mm", "addmm", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
            self.theirs.append(name)
        return operator(*args, **(kwargs or {}))


def everything(model: nn.Module) -> dict[str, Any]:
    """Each module with its class and all that it holds but the mark of ``convert``, by identity."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: (type(module), {k: v for k, v in vars(module).items() if k != MARK}) for name, module in modules}
