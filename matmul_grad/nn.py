"""``torch.nn.Linear`` on these kernels, and models whose own are swapped for it, in place and back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .compose import linear

__all__ = ["Linear", "convert", "converted", "restore"]

Model = TypeVar("Model", bound=nn.Module)
BEFORE = "_before_it_was_converted"  # the class that torch generated, kept on the one that takes its place
_log = logging.getLogger("matmul_grad")


class Linear(nn.Linear):
    """``torch.nn.Linear``, with its parameters, its initialisation and its name, computed by ``matmul_grad.linear``.

    C = A · Wᵀ + bias

    >>> import torch, matmul_grad
    >>> layer = matmul_grad.Linear(3, 2)
    >>> layer, layer(torch.ones(5, 3)).shape
    (Linear(in_features=3, out_features=2, bias=True), torch.Size([5, 2]))
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Converted(Linear):
    """What ``convert`` makes of ``torch.nn.Linear``, and ``restore`` takes back."""

    def _get_name(self) -> str:
        return "Linear" if type(self) is Converted else super()._get_name()


def convert(model: Model, filter: Callable[[nn.Module, str], bool] | None = None) -> Model:
    """Make every ``torch.nn.Linear`` of a model a ``matmul_grad.Linear``, in place; returns the model.

    A module becomes one of another class and nothing else about it changes: parameters, tied ones among them, hooks,
    buffers, devices, mode and state_dict are the same objects. Parametrised modules are swapped as well. Subclasses
    of ``torch.nn.Linear`` are left as they are, since they may compute something else, and so is a module with a
    ``forward`` of its own. What torch computes past a module stays torch's: attention, and the fused path of its
    transformer layers in evaluation. ``filter(module, name)`` leaves out those for which it is False.

    ``converted`` names the modules that were swapped, and the logger ``matmul_grad`` tells each at level INFO.

    >>> import torch, matmul_grad
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = matmul_grad.convert(model, lambda module, name: module.out_features > 2)
    >>> matmul_grad.converted(model)
    ['0']
    """
    for name, module in model.named_modules():
        if _is_linear(module) and (filter is None or filter(module, name)):
            module.__class__ = _on_base(module, nn.Linear, Converted)
            _log.info("converted %s: %s", name or "the model", module)
    return model


def restore(model: Model) -> Model:
    """Undo ``convert``, in place; returns the model.

    >>> import torch, matmul_grad
    >>> model = matmul_grad.convert(torch.nn.Linear(4, 8))
    >>> type(matmul_grad.restore(model)), matmul_grad.converted(model)
    (<class 'torch.nn.modules.linear.Linear'>, [])
    """
    for module in model.modules():
        if isinstance(module, Converted):
            module.__class__ = _on_base(module, Converted, nn.Linear)
    return model


def converted(model: nn.Module) -> list[str]:
    """Names of the modules that ``convert`` has swapped and ``restore`` would swap back; "" is the model itself.

    >>> import torch, matmul_grad
    >>> matmul_grad.converted(torch.nn.Linear(4, 8)), matmul_grad.converted(matmul_grad.convert(torch.nn.Linear(4, 8)))
    ([], [''])
    """
    return [name for name, module in model.named_modules() if isinstance(module, Converted)]


def _is_linear(module: nn.Module) -> bool:
    """Of torch's own class, or of the one that torch generates for a parametrised module."""
    kind = type(module)
    return "forward" not in vars(module) and (kind is nn.Linear or _is_generated(module, nn.Linear))


def _is_generated(module: nn.Module, base: type) -> bool:
    return parametrize.is_parametrized(module) and type(module).__bases__ == (base,)


def _on_base(module: nn.Module, base: type, other: type) -> type:
    """The class of a module with ``other`` in the place of ``base``; a generated one, which others may share, anew."""
    kind = type(module)
    if not _is_generated(module, base):
        return other
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__", BEFORE)}
    before = vars(kind).get(BEFORE)
    if before is not None and members.keys() <= vars(before).keys():
        return before  # unless something else was parametrised since
    return type(kind.__name__, (other,), members | ({BEFORE: kind} if other is Converted else {}))
