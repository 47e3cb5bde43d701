"""A product with two gradients, recorded by torch's C++ node ``MatmulBackward0``: no Python in forward or backward.

    matmul_grad::…      AutogradCPU     ``record``, if both operands need a gradient and nothing else follows them
    aten::matmul        PrivateUse3     the product, for CPU tensors: ``record`` alone calls it
    aten::matmul_backward  CPU, AutogradCPU  both gradients, or the one that is needed

``record`` calls aten::matmul with the dispatch keys of a device that nobody has. torch's autograd kernel takes the call
as from any device that has a kernel for it: it makes the node, saves both operands and calls the kernel of that device.
In backward the node calls aten::matmul_backward, which torch has for nested tensors alone, so nothing is overridden.

A small addmm with scales of 1 is recorded as that and torch's addition in place, which rounds as the epilogue does.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.gemm_args import GEMM_ARGS, ONE
from ..cpu.memory import call_address, get, jit, put, stack_words, text
from .call import FLOAT32, FLOAT64, HANDLE, NEW, RUN, item_size, linked_compute, set_tensors, tensor_words
from .op_table import BATCHES, MATRICES, OWN, Op
from .own_entries import (
    ENTRY_SIGNATURE,
    OWN_SIGNATURE,
    backward_in_python,
    delete_all,
    is_direct,
    is_without_modes,
    linked_backward,
    linked_record,
)
from .state import (
    ADD,
    AUTOCAST_KEY,
    HOOKS,
    KEY_EXCLUDED,
    KEYS_AT,
    PLAIN_KEYS,
    RECORD_KEYS,
    REDISPATCH,
    SCALE,
)
from .torch_c_api import (
    DIM,
    INFO,
    delete,
    delete_list,
    delete_tensor,
    describe,
    dtype_of,
    forward_pair_to,
    forward_to,
    get_dim,
    grad_mode,
    has_driver,
    has_tangent,
    is_tensor,
    is_within_storage,
    new,
    new_undefined,
    out_param,
    requires_grad,
    size,
    state,
    tensor_info,
)
from .torch_layout import FIRST_HOOK, NEXT_HOOK

call_hooks, call_key_excluded = call_address(1), call_address(1)
call_redispatch, call_add = call_address(4), call_address(3)
args_words = stack_words(GEMM_ARGS)
three_infos = stack_words(3 * INFO)
# Elements of a result: at 128 × 128 a second pass over it costs a tenth of what Python costs.
SMALL = 1 << 15
linked_recorded_backward = types.ExternalFunction("matmul_grad_matmul_backward", ENTRY_SIGNATURE)


@jit
def undefined():
    """A handle of an undefined tensor."""
    at = out_param()
    new_undefined(at)
    return get(at, 0)


@jit
def rank_of(tensor):
    at = out_param()
    get_dim(tensor, at)
    return get(at, 0)


@jit
def has_hooks():
    """Whether tensors that are saved for backward are passed to a hook: it is Python, and may raise."""
    hooks = call_hooks(get(state(), HOOKS), 0)
    return get(hooks, FIRST_HOOK) != get(hooks, NEXT_HOOK)


@jit
def is_autocast():
    return call_key_excluded(get(state(), KEY_EXCLUDED), get(state(), AUTOCAST_KEY)) & 0xFF == 0


@jit
def is_recordable(tensor):
    """Whether a tensor is an ordinary one that needs a gradient, without a tangent."""
    plain = get(get(tensor, 0), get(state(), KEYS_AT)) == get(state(), PLAIN_KEYS)
    return plain and requires_grad(get(tensor, 0)) != 0 and not has_tangent(tensor)


@jit
def is_addable(stack):
    """Whether the addend of an addmm can be added in place, with the bits of the epilogue and all that torch checks.

    float32 and float64 alone: a product of 16 bits is rounded before torch adds to it.
    """
    infos = three_infos()
    info, info_a, info_b = infos, infos + 8 * INFO, infos + 16 * INFO
    if get(stack, 3) != ONE or get(stack, 4) != ONE or has_tangent(get(stack, 0)):
        return False
    if get(get(get(stack, 0), 0), get(state(), KEYS_AT)) != get(state(), PLAIN_KEYS):
        return False
    if not (describe(get(stack, 0), info) and describe(get(stack, 1), info_a) and describe(get(stack, 2), info_b)):
        return False
    rank, dtype, m, n = get(info, DIM), dtype_of(info), size(info_a, 0), size(info_b, 1)
    if dtype != dtype_of(info_a) or (dtype != FLOAT32 and dtype != FLOAT64) or not 1 <= rank <= MATRICES:
        return False
    if size(info, rank - 1) != n or (rank == MATRICES and size(info, 0) != m):
        return False
    return m * n <= SMALL and is_within_storage(info, item_size(dtype))


def record(stack, kind, has_addend):
    """The product of two operands that both need a gradient, with its graph: 1; 0 where the operator in Python has to.

    The operands belong to the caller until the result is there, so that an error from below would keep them: there is
    none but where no memory is left for the node itself.
    """
    a, b = get(stack, has_addend), get(stack, has_addend + 1)
    if rank_of(a) != kind or rank_of(b) != kind:
        return 0
    if grad_mode() == 0 or not is_recordable(a) or not is_recordable(b) or not is_without_modes() or has_hooks():
        return 0
    if has_addend != 0 and (kind != MATRICES or not is_addable(stack)):
        return 0
    handle = new(8)
    call_redispatch(get(state(), REDISPATCH), handle, get(state(), RECORD_KEYS), a, b)
    if not is_tensor(handle):
        delete_tensor(handle)
        return 0
    if has_addend != 0:
        call_add(get(state(), ADD), handle, get(stack, 0), get(state(), SCALE))
    delete_all(stack, 2 + has_addend)
    put(stack, 0, handle)
    return 1


def make_tried_entry(op: Op) -> Callable:
    """The Autograd key of ``_mm_recorded``, ``_addmm_recorded``: as recorded here, to be tried before it is used."""
    has_addend, in_python = int(op.has_addend), text(f"matmul_grad::_{op.name}_in_python")

    def entry(stack, inputs, outputs):
        if linked_record(stack, MATRICES, has_addend) == 0:
            forward_to(stack, in_python())

    return entry


def matmul(stack, inputs, outputs):
    """``aten::matmul`` for the keys of ``record``: the product, or an undefined tensor where there is no kernel."""
    a, b, info = get(stack, 0), get(stack, 1), tensor_info()
    args, tensors, returned = args_words(), tensor_words(), out_param()
    result = 0
    if describe(a, info) and has_driver(dtype_of(info)) and MATRICES <= get(info, DIM) <= BATCHES:
        set_tensors(tensors, a, b, 0, 0)
        if linked_compute(tensors, args, get(info, DIM), NEW, 1, returned) == RUN:
            result = get(returned, HANDLE)
    delete_all(stack, 2)
    put(stack, 0, result if result != 0 else undefined())


@jit
def required(optional):
    """A ``Tensor`` of the C ABI from a ``Tensor?``, undefined where there is none."""
    if optional == 0:
        return undefined()
    handle = get(optional, 0)
    delete(optional)
    return handle


@jit
def return_undefined(stack):
    delete_all(stack, 3)
    delete_list(get(stack, 3))
    put(stack, 0, undefined())
    put(stack, 1, undefined())


@jit
def require_both(stack):
    put(stack, 0, required(get(stack, 0)))
    put(stack, 1, required(get(stack, 1)))


def matmul_backward(stack, inputs, outputs):
    """``aten::matmul_backward`` for CPU tensors: ``matmul_grad::mm_backward``, undefined for what is not needed."""
    if not is_tensor(get(stack, 0)):
        return_undefined(stack)
        return
    linked_backward(stack, inputs, outputs)
    require_both(stack)


def matmul_backward_autograd(stack, inputs, outputs):
    """The Autograd key of it: straight on, or the differentiable operator in Python."""
    if not is_tensor(get(stack, 0)):
        return_undefined(stack)
    elif is_direct(stack, 3, get(state(), PLAIN_KEYS)) and not is_autocast():
        linked_recorded_backward(stack, inputs, outputs)
    else:
        forward_pair_to(stack, backward_in_python())
        require_both(stack)


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_record": (record, OWN_SIGNATURE),
    **{
        f"matmul_grad_{op.name}_recorded_autograd": (make_tried_entry(op), ENTRY_SIGNATURE)
        for op in OWN
        if op.kind == MATRICES
    },
    "matmul_grad_matmul": (matmul, ENTRY_SIGNATURE),
    "matmul_grad_matmul_backward": (matmul_backward, ENTRY_SIGNATURE),
    "matmul_grad_matmul_backward_autograd": (matmul_backward_autograd, ENTRY_SIGNATURE),
}
