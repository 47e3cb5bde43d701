"""Whether a public function falls back to torch's, decided before anything is composed.

    not a tensor                                     torch raises its TypeError
    ``__torch_function__`` overridden                 subclasses, proxies of torch.fx, modes
    ``__torch_dispatch__`` of a class of the user's   it knows aten's operators, and may not know these
    nested, sparse, mkldnn                            the operators fall back by themselves, a composition cannot

Classes and modes of PyTorch's own which pass on any operator are no reason for a fallback: DTensor, fake and functional
tensors, the default device, the modes of torch.export.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function, has_torch_function_unary

from . import strict_mode
from .autocast import DEVICES
from .ops import DTYPES, require_storage

PLAIN = frozenset((Tensor, Parameter))
# Wrapper subclasses of PyTorch's for which torch.ops.matmul_grad is registered, or which pass on any operator.
SHARDED = frozenset(("AsyncCollectiveTensor", "DTensor"))
WRAPPERS = SHARDED | {"FakeTensor", "FunctionalTensor"}

unsafe_view = torch.ops.aten._unsafe_view.default  # of a result that nothing else holds: not a view to autograd


def is_needed(first: Any, second: Any, third: Any = ...) -> bool:
    """Whether the call falls back to torch's function; the operators support all other operands, of any layout.

    In a ``strict()`` block, compiled code is refused here where the dtype has no kernel: its graph would hold aten's.
    """
    if (
        type(first) in PLAIN
        and type(second) in PLAIN
        and (third is ... or type(third) in PLAIN)
        and not has_torch_function_unary(first)  # a mode
    ):
        if strict_mode.open_blocks and torch.compiler.is_compiling() and first.dtype not in DTYPES:
            strict_mode.note_fallback(first, second)
        return False
    return _is_overridden(first, second) if third is ... else _is_overridden(first, second, third)


def is_needed_to_compose(*operands: Any) -> bool:
    """``is_needed`` for compositions of several operators, which support the strided layout alone."""
    if is_needed(*operands[:3]) or (len(operands) > 3 and is_needed(*operands[-2:])):
        return True
    for x in operands:
        if x.layout is not torch.strided or x.is_nested:
            strict_mode.note_fallback(x, x)
            return True
    return False


def is_sharded(x: Tensor) -> bool:
    """Whether it is a DTensor, or a result of its collectives: an operator without a rule for them takes none."""
    if type(x) in PLAIN:  # Dynamo cannot follow the classes of a parameter
        return False
    return any(base.__name__ in SHARDED and _is_part_of_torch(base) for base in type(x).__mro__)


def require_storages(*operands: Tensor) -> None:
    """Raise RuntimeError for an operand that its storage does not hold, before something else reads it: a copy, torch.

    Of tensors that have a storage of their own: a tracer's and a transform's have none, or one without memory.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return
    require_storage(*(x for x in operands if type(x) in PLAIN))


def _is_overridden(*operands: Any) -> bool:
    if not all(isinstance(x, Tensor) for x in operands):
        return True
    if has_torch_function(operands) and (_is_mode_active() or any(_overrides_functions(type(x)) for x in operands)):
        return True
    return any(_overrides_operators(type(x)) for x in operands)


def _overrides_functions(kind: Any) -> bool:
    """Whether a subclass has a ``__torch_function__`` that is neither disabled nor the one of every tensor."""
    function = kind.__torch_function__
    if function is torch._C._disabled_torch_function_impl:
        return False
    return getattr(function, "__func__", None) is not getattr(Tensor.__torch_function__, "__func__", None)


def _overrides_operators(kind: Any) -> bool:
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    return not any(base.__name__ in WRAPPERS and _is_part_of_torch(base) for base in kind.__mro__)


def _is_mode_active() -> bool:
    """Whether a mode of torch functions is active that is not PyTorch's own."""
    modes = getattr(torch.overrides, "_get_current_function_mode_stack", None)
    return modes is None or not all(_is_part_of_torch(type(mode)) for mode in modes())


def _is_part_of_torch(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch"


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two operands have one device and one dtype, by themselves or after autocast."""
    if one.device != other.device:
        return False
    if one.dtype == other.dtype:
        return True
    cast = one.device.type in DEVICES and torch.is_autocast_enabled(one.device.type)
    return cast and all(x.is_floating_point() and x.dtype != torch.float64 for x in (one, other))
