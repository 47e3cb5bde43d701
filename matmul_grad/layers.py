"""The forward of torch's layers, which runs these kernels in modules that ``convert`` has marked.

A converted module keeps its class and carries one mark in its ``__dict__``. From the first ``convert`` on, the
``forward`` of the classes in ``CONVERTED`` looks for the mark: marked modules run on ``matmul_grad.linear`` or one of
this package's convolutions, all others run torch's function. docs/design.md, "Converted modules", has the reasons.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .convolution import FUNCTIONS
from .functional import linear, linear_to_parameters

MARK = "_matmul_grad"
Kinds = tuple[type[nn.Module], ...]
KINDS: Kinds = (nn.Linear, nn.MultiheadAttention)
CONVOLUTIONS: Kinds = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
EVERY_KIND = (*KINDS, *CONVOLUTIONS)

Forward = Callable[..., Any]

_calls: defaultdict[tuple[str, str], int] = defaultdict(int)
_torch_impl: dict[type[nn.Module], Forward] = {}  # the forward of each class before it was replaced


class Mark:
    """Set on a converted module. Copies and pickles of a module carry it; reading one replaces the forwards.

    accumulate: whether the gradients of its weights are added to in the product.
    """

    def __init__(self, accumulate: bool) -> None:
        self.accumulate = accumulate

    def __reduce__(self) -> tuple[Callable[..., Mark], tuple[bool, ...]]:
        return make_mark, (True,) if self.accumulate else ()


_mark, _accumulating = Mark(False), Mark(True)


def make_mark(accumulate: bool = False) -> Mark:
    """The mark, once the forwards look for it."""
    for kind, converted in CONVERTED.items():
        if getattr(kind.forward, MARK, None) is not _mark:
            torch_impl = _torch_impl.setdefault(kind, kind.forward)
            setattr(kind, MARK, None)
            kind.forward = _replace(kind.forward, converted(torch_impl))
    return _accumulating if accumulate else _mark


def is_marked(module: nn.Module) -> bool:
    return MARK in vars(module)


def is_class_forward(module: nn.Module, forward: Any) -> bool:
    """Whether this is the forward of the module's own class, bound to it, as it is now or was before the first mark."""
    functions = {type(module).forward, *(_torch_impl.get(kind) for kind in EVERY_KIND if isinstance(module, kind))}
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) in functions


def calls() -> dict[str, dict[str, int]]:
    """How often converted modules were called, by operator and dtype; compiled and exported code is not counted.

    As in ``matmul_grad.info()``. Calls that threads make in the same moment may be counted once.

    >>> import torch, matmul_grad
    >>> layer = matmul_grad.convert(torch.nn.Linear(4, 3, dtype=torch.float64))
    >>> before = matmul_grad.nn.calls().get("linear", {}).get("float64", 0)
    >>> result = layer(torch.ones(2, 4, dtype=torch.float64))
    >>> matmul_grad.nn.calls()["linear"]["float64"] - before
    1
    """
    found: dict[str, dict[str, int]] = {}
    for (operator, dtype), count in list(_calls.items()):
        found.setdefault(operator, {})[dtype] = count
    return found


def counted_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear``, and one more call where it runs in eager mode; torch's where TorchScript traces for ONNX."""
    return (functional.linear if _is_left_to_torch("linear", input) else linear)(input, weight, bias)


def accumulating_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """``linear``, whose weight gradient is added to the one that is there where that can be."""
    result = linear_to_parameters(input, weight, bias, activation, accumulate=True)
    return linear(input, weight, bias, activation) if result is None else result


def counted_accumulating_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``counted_linear``."""
    return (functional.linear if _is_left_to_torch("linear", input) else accumulating_linear)(input, weight, bias)


def _is_left_to_torch(name: str, input: Tensor) -> bool:
    """Whether TorchScript traces for ONNX; if not, the call is counted."""
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            return True
        if type(input) is Tensor:
            _calls[name, str(input.dtype).removeprefix("torch.")] += 1
    return False


def _replace(torch_impl: Forward, converted: Forward) -> Forward:
    """A forward that runs ``converted`` on marked modules and ``torch_impl`` on others.

    TorchScript compiles the source of the function that is wrapped, with the globals of the wrapper: both are torch's.
    """

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        # By attribute, since Dynamo guards that and not what a __dict__ has not; ``self`` may be of any class.
        if getattr(self, "_matmul_grad", None) is None:
            return torch_impl(self, *arguments, **named)
        return converted(self, *arguments, **named)

    function = FunctionType(forward.__code__, torch_impl.__globals__, closure=forward.__closure__)
    replaced = functools.wraps(torch_impl)(function)
    setattr(replaced, MARK, _mark)
    return replaced


def _linear_of(module: Any) -> Forward:
    """The linear function of a marked module. Compiled code accumulates nothing."""
    if torch.compiler.is_compiling() or not getattr(module, MARK).accumulate:
        return counted_linear
    return counted_accumulating_linear


def _linear(layer: nn.Linear, input: Tensor) -> Tensor:
    result: Tensor = _linear_of(layer)(input, layer.weight, layer.bias)
    return result


def _unless_nested(torch_impl: Forward, composed: Forward) -> Forward:
    """``composed``, but ``torch_impl`` for nested tensors, which have torch's fused kernels alone."""

    def forward(layer: nn.Module, input: Tensor, *arguments: Any, **named: Any) -> Any:
        return (torch_impl if input.is_nested else composed)(layer, input, *arguments, **named)

    return forward


# --- torch's functions with other globals: attention without its fused kernel, on our linear -----------------


class _Namespace:
    """The names of a module, some of them replaced."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        vars(self).update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _with_globals(function: Forward, **replaced: Any) -> Forward:
    """The function with some of its globals replaced, without ``__name__``, by which Dynamo would find torch's."""
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"} | replaced
    copied = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _without_fused_kernels() -> _Namespace:
    """``torch``, in which torch.backends.mha.get_fastpath_enabled() is False."""
    mha = _Namespace(torch.backends.mha, get_fastpath_enabled=lambda: False)
    return _Namespace(torch, backends=_Namespace(torch.backends, mha=mha))


def _overrides(operands: tuple[Any, ...]) -> bool:
    """Whether an operand's class overrides torch's functions; a mode (as set_default_device is) sees the parts."""
    disabled = nn.Parameter.__torch_function__
    if torch.compiler.is_compiling():
        return False
    return any(type(x) is not Tensor and getattr(type(x), "__torch_function__", disabled) != disabled for x in operands)


def _attention(torch_impl: Forward) -> Forward:
    """``torch.nn.MultiheadAttention.forward``, whose in_proj and out_proj are ours."""
    plain, accumulating = (_attention_with(torch_impl, f) for f in (counted_linear, counted_accumulating_linear))

    def forward(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        return (plain if _linear_of(module) is counted_linear else accumulating)(module, *arguments, **named)

    return _unless_nested(torch_impl, forward)


def _attention_with(torch_impl: Forward, linear: Forward) -> Forward:
    names: dict[str, Any] = {"linear": linear, "has_torch_function": _overrides}
    for projection in ("_in_projection", "_in_projection_packed"):
        if (function := getattr(functional, projection, None)) is not None:
            names[projection] = _with_globals(function, **names)
    attention = _with_globals(functional.multi_head_attention_forward, **names)
    replaced = _Namespace(functional, multi_head_attention_forward=attention)
    return _with_globals(torch_impl, torch=_without_fused_kernels(), F=replaced)


def _encoder_layer(torch_impl: Forward) -> Forward:
    """``torch.nn.TransformerEncoderLayer.forward``, which calls its modules in evaluation too."""
    return _unless_nested(torch_impl, _with_globals(torch_impl, torch=_without_fused_kernels()))


# --- convolutions: torch's forward, with our function for torch's --------------------------------------------------


def with_convolution(kind: type[nn.Module], method: Forward, is_counted: bool = False) -> Forward:
    """A method of torch's class for convolutions, in which ``F``'s convolution is ours."""
    name = kind.__name__.lower().replace("transpose", "_transpose")
    ours, torch_impl = FUNCTIONS[name], getattr(functional, name)

    def counted(input: Tensor, *arguments: Any) -> Tensor:
        return (torch_impl if _is_left_to_torch(name, input) else ours)(input, *arguments)

    return _with_globals(method, F=_Namespace(functional, **{name: counted if is_counted else ours}))


def _convolution(kind: type[nn.Module]) -> Callable[[Forward], Forward]:
    def make(torch_impl: Forward) -> Forward:
        inner = vars(kind).get("_conv_forward")  # which transposed ones do not have
        if inner is None:
            return with_convolution(kind, torch_impl, is_counted=True)
        convolved = with_convolution(kind, inner, is_counted=True)

        def forward(layer: Any, input: Tensor) -> Any:
            return convolved(layer, input, layer.weight, layer.bias)

        return forward

    return make


CONVERTED: dict[type[nn.Module], Callable[[Forward], Forward]] = {
    nn.Linear: lambda _: _linear,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    **{kind: _convolution(kind) for kind in CONVOLUTIONS},
}
