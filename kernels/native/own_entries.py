"""The compiled kernels of ``matmul_grad::*`` for CPU tensors: no Python between the caller and the microkernel.

Signature, from torch's stable C ABI: ``void entry(uint64* stack, uint64 inputs, uint64 outputs)``. The inputs are
tensor handles that the entry owns and must delete; the outputs take their place on the stack. Scales are float64 in the
schema, since that ABI carries no Scalar.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.gemm_args import ALPHA, BETA, GEMM_ARGS
from ..cpu.memory import INT64, call_address, get, jit, put, stack_words, text
from .broadcast import linked_matmul
from .call import (
    FREED,
    HANDLE,
    OUT_OF_BOUNDS,
    PENDING,
    RUN,
    UNSUPPORTED,
    linked_compute,
    set_tensors,
    tensor_words,
)
from .op_table import COMPOSED, LINEAR, OWN, Op
from .state import (
    AUTOCAST_KEY,
    FUNCTIONALIZE_KEY,
    FUNCTORCH_KEY,
    INTERRUPTED,
    KEY_EXCLUDED,
    KEYS_AT,
    NOT_ACCELERATED,
    PLAIN_KEYS,
    PYTHON_KEY,
    RECORD,
    RECORD_ANY,
    RECORD_PRODUCT,
    STRICT,
)
from .torch_c_api import (
    delete,
    delete_tensor,
    driver_of,
    fail,
    forward_to,
    key_included,
    needs_gradient,
    no_storage_message,
    out_param,
    raise_pending,
    read_dtype,
    small_storage_message,
    state,
    strict_message,
)

ENTRY_SIGNATURE = types.void(INT64, INT64, INT64)
OWN_SIGNATURE = INT64(INT64, INT64, INT64)

linked_own = types.ExternalFunction("matmul_grad_own", OWN_SIGNATURE)
call_key_excluded, call_record = call_address(1), call_address(3)
args_words = stack_words(GEMM_ARGS)


@jit
def raise_for(outcome):
    """Raise the error of an outcome that is one."""
    if outcome == FREED:
        fail(no_storage_message())
    if outcome == OUT_OF_BOUNDS:
        fail(small_storage_message())
    if outcome == PENDING:
        raise_pending()
    fail(strict_message())


@jit
def is_error(outcome):
    refused = outcome == UNSUPPORTED and get(state(), STRICT) != 0
    return refused or outcome in (FREED, OUT_OF_BOUNDS, PENDING)


@jit
def delete_all(stack, count):
    for index in range(count):
        delete_tensor(get(stack, index))


def own(stack, kind, has_addend):
    """Compute the product that the stack describes and return 1; 0 for a fallback, which takes the stack as it is."""
    args, tensors, returned = args_words(), tensor_words(), out_param()
    a, b, source = get(stack, has_addend), get(stack, has_addend + 1), 0
    if has_addend != 0:
        source = get(stack, 0)
        put(args, BETA, get(stack, 3))
        put(args, ALPHA, get(stack, 4))
    set_tensors(tensors, a, b, source, 0)
    outcome = linked_compute(tensors, args, kind, 1, returned)
    if outcome != RUN and not is_error(outcome):
        return 0
    delete_all(stack, 2 + has_addend)
    if outcome != RUN:
        raise_for(outcome)
    put(stack, 0, get(returned, HANDLE))
    return 1


def make_entry(op: Op) -> Callable:
    """The CPU key of an operator of OWN.

    C = A · B, or beta · input + alpha · (A · B)

    shapes      a (m, k), b (k, n), input any that expands to (m, n); bmm, baddbmm: with one more size in front
    strides     any; the result is contiguous
    dtypes      one for all, with a kernel; others fall back to PyTorch's kernel
    aliasing    the result is new memory; operands are only read
    rounding    as the driver's
    errors      PyTorch's kernel raises them
    determinism as the driver's
    source      docs/design.md, "Functions and modules"
    """
    kind, has_addend = op.kind, int(op.has_addend)
    fallback = text(f"matmul_grad::_{op.name}_by_torch")

    def entry(stack, inputs, outputs):
        if linked_own(stack, kind, has_addend) == 0:
            forward_to(stack, fallback())

    return entry


@jit
def is_direct(tensors, count, plain):
    """Whether no graph is recorded and no kernel is registered between autograd and the device.

    True without a mode, for tensors whose dispatch keys are those of an ordinary one, ``plain``.
    """
    place = get(state(), KEYS_AT)
    for index in range(count):
        if get(get(get(tensors, index), 0), place) != plain or needs_gradient(get(tensors, index)):
            return False
    return is_without_modes()


@jit
def is_without_modes():
    modes = key_included(get(state(), PYTHON_KEY)) | key_included(get(state(), FUNCTORCH_KEY))
    return modes | key_included(get(state(), FUNCTIONALIZE_KEY)) == 0


@jit
def is_recorded(which, stack, count, kind):
    """Whether compiled code, at a word of the state, has computed the product with its graph."""
    return get(state(), RECORD) != 0 and call_record(get(state(), which), stack, count, kind) != 0


@jit
def is_autocast():
    return call_key_excluded(get(state(), KEY_EXCLUDED), get(state(), AUTOCAST_KEY)) & 0xFF == 0


def make_autograd_entry(op: Op) -> Callable:
    """The Autograd key of an operator: straight on to its CPU kernel, or recorded by torch's node or in autograd.py."""
    tensors, in_python = 2 + op.has_addend, text(f"matmul_grad::_{op.name}_in_python")
    has_addend, kind = int(op.has_addend), op.kind
    linked = types.ExternalFunction(f"matmul_grad_{op.name}", ENTRY_SIGNATURE)

    def entry(stack, inputs, outputs):
        if is_direct(stack, tensors, get(state(), PLAIN_KEYS)):
            linked(stack, inputs, outputs)
        elif not is_recorded(RECORD_PRODUCT, stack, kind, has_addend):
            forward_to(stack, in_python())

    return entry


@jit
def bias_of(stack, op_inputs):
    """The handle of an optional third operand; 0 where there is none."""
    return get(get(stack, 2), 0) if op_inputs == 3 and get(stack, 2) != 0 else 0


@jit
def delete_operands(stack, op_inputs):
    delete_all(stack, 2)
    if op_inputs == 3 and get(stack, 2) != 0:
        delete_tensor(get(get(stack, 2), 0))
        delete(get(stack, 2))


def make_composed_entry(op: Op) -> Callable:
    """The CPU key of ``matmul`` or ``linear``: one call of ``broadcast.py``, or the composition in Python."""
    is_linear, in_python = int(op.kind == LINEAR), text(f"matmul_grad::_{op.name}_in_python")

    def entry(stack, inputs, outputs):
        returned, driver = out_param(), driver_of(read_dtype(get(stack, 0)))
        if driver == INTERRUPTED:
            delete_operands(stack, inputs)
            raise_pending()
        a, b, bias = get(stack, 0), get(stack, 1), bias_of(stack, inputs)
        if driver != NOT_ACCELERATED and linked_matmul(a, b, bias, is_linear, returned) == RUN:
            delete_operands(stack, inputs)
            put(stack, 0, get(returned, HANDLE))
        else:
            forward_to(stack, in_python())

    return entry


def make_composed_autograd_entry(op: Op) -> Callable:
    """The Autograd key of it: straight on, or recorded by torch's nodes, or by those of the composition in Python."""
    is_linear, in_python = int(op.kind == LINEAR), text(f"matmul_grad::_{op.name}_in_python")
    linked = types.ExternalFunction(f"matmul_grad_{op.name}", ENTRY_SIGNATURE)

    def entry(stack, inputs, outputs):
        plain = get(state(), PLAIN_KEYS)
        has_bias = bias_of(stack, inputs) != 0
        if is_direct(stack, 2, plain) and (not has_bias or is_direct(get(stack, 2), 1, plain)):
            linked(stack, inputs, outputs)
        elif not is_recorded(RECORD_ANY, stack, inputs, is_linear):
            forward_to(stack, in_python())

    return entry


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_own": (own, OWN_SIGNATURE),
    **{f"matmul_grad_{op.name}": (make_entry(op), ENTRY_SIGNATURE) for op in OWN},
    **{f"matmul_grad_{op.name}_autograd": (make_autograd_entry(op), ENTRY_SIGNATURE) for op in OWN},
    **{f"matmul_grad_{op.name}": (make_composed_entry(op), ENTRY_SIGNATURE) for op in COMPOSED},
    **{f"matmul_grad_{op.name}_autograd": (make_composed_autograd_entry(op), ENTRY_SIGNATURE) for op in COMPOSED},
}
