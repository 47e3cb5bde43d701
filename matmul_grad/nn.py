"""torch's linear and convolutional layers on these kernels, and models that are switched to them, in place and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from . import decompositions
from .activation_formulas import require_name
from .functional import linear
from .gated_layer import GatedLinear
from .layers import EVERY_KIND, KINDS, MARK, Kinds, accumulating_linear, calls, is_class_forward, is_marked, make_mark
from .layers import with_convolution as _with

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GatedLinear",
    "Linear",
    "calls",
    "convert",
    "converted",
    "left_out",
    "restore",
]

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger("matmul_grad")

decompositions.register()


class Linear(nn.Linear):
    """``torch.nn.Linear``, with its parameters, its initialisation and its name, computed by ``matmul_grad.linear``.

    C = activation(A · Wᵀ + bias)

    ``activation`` is one that ``matmul_grad.linear`` takes; it has no parameters, so the state_dict is torch's.

    With ``accumulate`` backward adds to ``weight.grad`` in the product, dW += dCᵀ · A, without a temporary: where the
    gradient is float32 (a float32 weight, under autocast too, or ``weight.grad_dtype = torch.float32``), or float64 of
    float64. If the weight has a float32 tensor as ``main_grad``, backward adds to that. Gradients, hooks and errors
    are otherwise torch's; where something is to see the contribution by itself, it is computed by itself: with hooks of
    the tensor, ``torch.autograd.grad``, ``create_graph``, anomaly detection, transforms and in compiled code.

    >>> import torch, matmul_grad
    >>> layer = matmul_grad.Linear(3, 2)
    >>> layer, layer(torch.ones(5, 3)).shape
    (Linear(in_features=3, out_features=2, bias=True), torch.Size([5, 2]))
    >>> matmul_grad.Linear(3, 2, activation="gelu")
    Linear(in_features=3, out_features=2, bias=True, activation='gelu')
    >>> layer = matmul_grad.Linear(3, 2, accumulate=True)
    >>> for part in torch.ones(4, 3).split(2):
    ...     layer(part).sum().backward()
    >>> layer.weight.grad.tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """

    activation: str | None = None  # of layers that were pickled without one, too
    accumulate: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        activation: str | None = None,
        accumulate: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if activation is not None:
            require_name(activation)
            self.activation = activation
        if accumulate:
            self.accumulate = True

    def forward(self, input: Tensor) -> Tensor:
        product = accumulating_linear if self.accumulate else linear
        return product(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        shown = shown if self.activation is None else f"{shown}, activation={self.activation!r}"
        return f"{shown}, accumulate=True" if self.accumulate else shown


class Conv1d(nn.Conv1d):
    """``torch.nn.Conv1d``, with its parameters, computed by ``matmul_grad.conv1d``.

    >>> import torch, matmul_grad
    >>> matmul_grad.nn.Conv1d(2, 3, 3, stride=2, padding=1)(torch.ones(1, 2, 5)).shape
    torch.Size([1, 3, 3])
    """

    _conv_forward = _with(nn.Conv1d, nn.Conv1d._conv_forward)


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d``, with its parameters, computed by ``matmul_grad.conv2d``.

    >>> import torch, matmul_grad
    >>> matmul_grad.nn.Conv2d(2, 3, 3, stride=2, padding=1)(torch.ones(1, 2, 5, 5)).shape
    torch.Size([1, 3, 3, 3])
    """

    _conv_forward = _with(nn.Conv2d, nn.Conv2d._conv_forward)


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d``, with its parameters, computed by ``matmul_grad.conv3d``.

    >>> import torch, matmul_grad
    >>> matmul_grad.nn.Conv3d(2, 3, 3, stride=2, padding=1)(torch.ones(1, 2, 5, 5, 5)).shape
    torch.Size([1, 3, 3, 3, 3])
    """

    _conv_forward = _with(nn.Conv3d, nn.Conv3d._conv_forward)


class ConvTranspose1d(nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d``, with its parameters, computed by ``matmul_grad.conv_transpose1d``.

    >>> import torch, matmul_grad
    >>> matmul_grad.nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1)(torch.ones(1, 2, 5)).shape
    torch.Size([1, 3, 9])
    """

    forward = _with(nn.ConvTranspose1d, nn.ConvTranspose1d.forward)


class ConvTranspose2d(nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d``, with its parameters, computed by ``matmul_grad.conv_transpose2d``.

    >>> import torch, matmul_grad
    >>> matmul_grad.nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)(torch.ones(1, 2, 5, 5)).shape
    torch.Size([1, 3, 9, 9])
    """

    forward = _with(nn.ConvTranspose2d, nn.ConvTranspose2d.forward)


class ConvTranspose3d(nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d``, with its parameters, computed by ``matmul_grad.conv_transpose3d``.

    >>> import torch, matmul_grad
    >>> matmul_grad.nn.ConvTranspose3d(2, 3, 3, stride=2, padding=1)(torch.ones(1, 2, 5, 5, 5)).shape
    torch.Size([1, 3, 9, 9, 9])
    """

    forward = _with(nn.ConvTranspose3d, nn.ConvTranspose3d.forward)


OWN: Kinds = (Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)


def convert(
    model: Model,
    filter: Callable[[nn.Module, str], bool] | None = None,
    kinds: Kinds = KINDS,
    accumulate: bool = False,
) -> Model:
    """Compute every ``torch.nn.Linear`` and ``torch.nn.MultiheadAttention`` of a model by ``matmul_grad.linear``.

    In place; returns the model. A converted module keeps its class and gets one private attribute; nothing else about
    it changes: parameters, tied ones among them, hooks, buffers, devices, mode and state_dict are the same objects,
    and what looks for ``torch.nn.Linear`` finds it. Lazy and parametrised modules are converted, and so are classes
    made on top of torch's (``fully_shard``'s, a mixin's), unless they have a ``forward`` of their own. Of an attention
    in_proj and out_proj are converted, and torch's fused kernels for evaluation are not used: the same values within
    rounding, except that nested tensors still take them.

    ``kinds`` are the classes of torch's to convert: besides these two, which are the default, ``torch.nn.Conv1d`` to
    ``ConvTranspose3d``. A convolution with a ``padding_mode`` is padded first, as in torch.

    With ``accumulate`` the weight gradients of linear layers and attentions are added to ``weight.grad`` in the
    product, as in ``matmul_grad.Linear(..., accumulate=True)``; a second call changes it for the modules it chooses.

    ``filter(module, name)`` leaves out those for which it is False; for an attention it is asked of its ``out_proj``.
    ``converted`` names the modules that were converted, ``left_out`` those that cannot be, with the reason. The logger
    ``matmul_grad`` has the former at level INFO and the latter at level WARNING.

    >>> import torch, matmul_grad
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> model = matmul_grad.convert(model, lambda module, name: module.out_features > 2)
    >>> matmul_grad.converted(model)
    ['0']
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    >>> matmul_grad.converted(matmul_grad.convert(model, kinds=(torch.nn.Linear, torch.nn.Conv2d)))
    ['0', '2']
    """
    _require_kinds(kinds)
    mark, reasons = make_mark(accumulate), {}
    for name, module in _layers(model, kinds):
        if vars(module).get(MARK) is mark or not (filter is None or _is_chosen(filter, module, name)):
            continue
        if is_marked(module):
            vars(module)[MARK] = mark
            continue
        if reason := _obstacle(module):
            reasons[name] = reason
            continue
        vars(module).pop("forward", None)  # the class's own, as _obstacle has found
        vars(module)[MARK] = mark
        _log.info("converted %s: %s", name or "the model", module)
    _mark_encoder_layers(model)
    if reasons:
        told = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in reasons.items())
        _log.warning("matmul_grad.convert() left out %d of the model's layers: %s", len(reasons), told)
    return model


def restore(model: Model) -> Model:
    """Undo ``convert``, in place; returns the model.

    >>> import torch, matmul_grad
    >>> model = matmul_grad.convert(torch.nn.Linear(4, 8))
    >>> matmul_grad.converted(matmul_grad.restore(model))
    []
    """
    for module in model.modules():
        vars(module).pop(MARK, None)
    return model


def converted(model: nn.Module) -> list[str]:
    """Names of the modules that ``convert`` has converted and ``restore`` would restore; "" is the model itself.

    >>> import torch, matmul_grad
    >>> matmul_grad.converted(torch.nn.Linear(4, 8)), matmul_grad.converted(matmul_grad.convert(torch.nn.Linear(4, 8)))
    ([], [''])
    """
    return [name for name, module in model.named_modules() if isinstance(module, EVERY_KIND) and is_marked(module)]


def left_out(model: nn.Module, kinds: Kinds = KINDS) -> dict[str, str]:
    """Names of the layers of these kinds that ``convert`` cannot convert, and why.

    >>> import torch, matmul_grad
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> model[0].forward = lambda input: input
    >>> matmul_grad.nn.left_out(model)
    {'0': 'its forward was replaced: convert first, and replace it then'}
    """
    found = {name: _obstacle(module) for name, module in _layers(model, kinds) if not is_marked(module)}
    return {name: reason for name, reason in found.items() if reason}


def _require_kinds(kinds: Kinds) -> None:
    """Raise ValueError for a class that no layer is converted by."""
    for kind in kinds:
        if kind not in EVERY_KIND:
            known = ", ".join(each.__name__ for each in EVERY_KIND)
            raise ValueError(f"convert() has no kernels for {kind!r}; kinds are of torch.nn: {known}")


def _layers(model: nn.Module, kinds: Kinds) -> Iterator[tuple[str, nn.Module]]:
    """The modules of these kinds, once each, without the ones whose class is ours.

    The projection within an attention is a module that nobody calls: the attention reads its weight.
    """
    within = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not isinstance(module, OWN) and id(module) not in within:
            yield name, module


def _is_chosen(filter: Callable[[nn.Module, str], bool], module: nn.Module, name: str) -> bool:
    """An attention is known by its projection, which has the sizes of a linear layer."""
    if isinstance(module, nn.MultiheadAttention):
        return filter(module.out_proj, f"{name}.out_proj".lstrip("."))
    return filter(module, name)


def _obstacle(module: nn.Module) -> str:
    """Why a layer cannot be converted, or ""."""
    kind, own = next(kind for kind in EVERY_KIND if isinstance(module, kind)), type(module)
    inner = "_conv_forward"  # which the forward of a convolution calls
    if own.forward is not kind.forward or getattr(own, inner, None) is not getattr(kind, inner, None):
        return f"its class {type(module).__qualname__} has a forward of its own"
    if "forward" in vars(module) and not is_class_forward(module, vars(module)["forward"]):
        return "its forward was replaced: convert first, and replace it then"
    return ""


def _mark_encoder_layers(model: nn.Module) -> None:
    """torch's fused encoder layer reads the weights of its modules; one with a converted module calls them instead."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(map(is_marked, module.children())):
            vars(module)[MARK] = make_mark()
