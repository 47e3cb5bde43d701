"""The compiled kernels of ``matmul_grad::*`` for CPU tensors: no Python between the caller and the microkernel.

Signature, from torch's stable C ABI: ``void entry(uint64* stack, uint64 inputs, uint64 outputs)``. The inputs are
tensor handles that the entry owns and must delete; the outputs take their place on the stack. Scales are float64 in the
schema, since that ABI carries no Scalar.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.gemm_args import A_CS, A_RS, ALPHA, B_CS, B_RS, BETA, C_CS, C_RS, GEMM_ARGS, A, B, C, K, M, N
from ..cpu.memory import INT64, call_address, get, jit, put, stack_words, text
from ..cpu.schedule import MAX_PRODUCTS, set_dense_c
from .call import (
    FREED,
    HANDLE,
    NEW,
    OUT_OF_BOUNDS,
    PENDING,
    RUN,
    UNSUPPORTED,
    item_size,
    linked_compute,
    set_tensors,
    tensor_words,
)
from .op_table import OWN, Op
from .state import (
    FUNCTIONALIZE_KEY,
    FUNCTORCH_KEY,
    INTERRUPTED,
    KEYS_AT,
    NOT_ACCELERATED,
    PLAIN_KEYS,
    PYTHON_KEY,
    RECORD,
    STRICT,
)
from .torch_c_api import (
    DATA,
    DIM,
    INFO,
    delete_list,
    delete_tensor,
    describe,
    driver_of,
    dtype_of,
    empty_strided,
    fail,
    forward_pair_to,
    forward_to,
    get_mutable_data,
    is_within_storage,
    key_included,
    list_item,
    locate,
    needs_gradient,
    new,
    no_storage_message,
    out_param,
    raise_pending,
    size,
    small_storage_message,
    state,
    strict_message,
    stride,
    threads,
)

ENTRY_SIGNATURE = types.void(INT64, INT64, INT64)
OWN_SIGNATURE = INT64(INT64, INT64, INT64)

linked_own = types.ExternalFunction("matmul_grad_own", OWN_SIGNATURE)
linked_record = types.ExternalFunction("matmul_grad_record", OWN_SIGNATURE)
linked_backward = types.ExternalFunction("matmul_grad_mm_backward", ENTRY_SIGNATURE)
call_gemm = call_address(3)
args_words = stack_words(GEMM_ARGS)
pair_words = stack_words(MAX_PRODUCTS * GEMM_ARGS)
matrix_shape = stack_words(4)
info_words = stack_words(3 * INFO)
backward_in_python = text("matmul_grad::_mm_backward_in_python")


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
    outcome = linked_compute(tensors, args, kind, NEW, 1, returned)
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


def make_autograd_entry(op: Op) -> Callable:
    """The Autograd key of an operator: straight on to its CPU kernel, or recorded by torch's node or in autograd.py."""
    tensors, in_python = 2 + op.has_addend, text(f"matmul_grad::_{op.name}_in_python")
    has_addend, kind = int(op.has_addend), op.kind
    linked = types.ExternalFunction(f"matmul_grad_{op.name}", ENTRY_SIGNATURE)

    def entry(stack, inputs, outputs):
        if is_direct(stack, tensors, get(state(), PLAIN_KEYS)):
            linked(stack, inputs, outputs)
        elif get(state(), RECORD) == 0 or linked_record(stack, kind, has_addend) == 0:
            forward_to(stack, in_python())

    return entry


@jit
def backward_driver(grad, a, b, info_grad, info_a, info_b):
    """The driver for both gradients, or NOT_ACCELERATED: the operator in Python computes them or raises."""
    if not (describe(grad, info_grad) and describe(a, info_a) and describe(b, info_b)):
        return NOT_ACCELERATED
    if get(info_grad, DIM) != 2 or get(info_a, DIM) != 2 or get(info_b, DIM) != 2:
        return NOT_ACCELERATED
    m, k, n = size(info_a, 0), size(info_a, 1), size(info_b, 1)
    if m != size(info_grad, 0) or n != size(info_grad, 1) or k != size(info_b, 0) or min(m, k, n) == 0:
        return NOT_ACCELERATED
    dtype = dtype_of(info_a)
    if dtype != dtype_of(info_b) or dtype != dtype_of(info_grad):
        return NOT_ACCELERATED
    item = item_size(dtype)
    if not is_within_storage(info_grad, item) or not is_within_storage(info_a, item):
        return NOT_ACCELERATED
    if not is_within_storage(info_b, item):
        return NOT_ACCELERATED
    if not locate(grad, info_grad) or not locate(a, info_a) or not locate(b, info_b):
        return NOT_ACCELERATED
    return driver_of(dtype)


@jit
def is_column_major(info):
    """As in PyTorch's derivative formula: the gradient gets the memory order of its operand."""
    return stride(info, 0) == 1 and stride(info, 1) == size(info, 0)


@jit
def empty_like(info, dtype):
    """A new matrix of the same sizes, row-major or column-major as the other is; 0 where torch has no memory for it."""
    at, handle = matrix_shape(), out_param()
    rows, columns = size(info, 0), size(info, 1)
    put(at, 0, rows)
    put(at, 1, columns)
    put(at, 2, 1 if is_column_major(info) else columns)
    put(at, 3, rows if is_column_major(info) else 1)
    return 0 if empty_strided(2, at, at + 16, dtype, 0, 0, handle) != 0 else get(handle, 0)


@jit
def set_gradient(args, info_a, swap_a, info_b, swap_b, info_like, out):
    """A product of two matrices, or of their transposes, into ``out``, in the memory order of ``info_like``."""
    at = out_param()
    get_mutable_data(out, at)
    put(args, M, size(info_a, swap_a))
    put(args, K, size(info_a, 1 - swap_a))
    put(args, N, size(info_b, 1 - swap_b))
    put(args, A, get(info_a, DATA))
    put(args, A_RS, stride(info_a, swap_a))
    put(args, A_CS, stride(info_a, 1 - swap_a))
    put(args, B, get(info_b, DATA))
    put(args, B_RS, stride(info_b, swap_b))
    put(args, B_CS, stride(info_b, 1 - swap_b))
    put(args, C, get(at, 0))
    set_dense_c(args, size(info_like, 1))
    if is_column_major(info_like):
        put(args, C_RS, 1)
        put(args, C_CS, size(info_like, 0))


@jit
def is_in_mask(mask, index):
    at = out_param()
    list_item(mask, index, at)
    return (get(at, 0) & 0xFF) != 0


@jit
def optional(tensor):
    """A ``Tensor?`` of the C ABI: 0, or the address of a handle that torch frees."""
    if tensor == 0:
        return 0
    at = new(8)
    put(at, 0, tensor)
    return at


@jit
def delete_if(tensor):
    if tensor != 0:
        delete_tensor(tensor)


def mm_backward(stack, inputs, outputs):
    """``matmul_grad::mm_backward``: both gradients in one call of the driver, for dense CPU tensors.

    Each gradient has the memory order of its operand, as in PyTorch. Anything unexpected goes to the operator in
    Python.
    """
    grad, a, b, mask = get(stack, 0), get(stack, 1), get(stack, 2), get(stack, 3)
    infos = info_words()
    info_grad, info_a, info_b = infos, infos + 8 * INFO, infos + 16 * INFO
    driver = backward_driver(grad, a, b, info_grad, info_a, info_b)
    if driver == INTERRUPTED:
        delete_all(stack, 3)
        delete_list(mask)
        raise_pending()
    if driver == NOT_ACCELERATED:
        forward_pair_to(stack, backward_in_python())
        return
    dtype, args, count = dtype_of(info_a), pair_words(), 0
    needs_a, needs_b = is_in_mask(mask, 0), is_in_mask(mask, 1)
    grad_a = empty_like(info_a, dtype) if needs_a else 0
    grad_b = empty_like(info_b, dtype) if needs_b else 0
    failed = (needs_a and grad_a == 0) or (needs_b and grad_b == 0)
    if not failed:
        if needs_a:
            set_gradient(args, info_grad, 0, info_b, 1, info_a, grad_a)
            count += 1
        if needs_b:
            set_gradient(args + 8 * GEMM_ARGS * count, info_a, 1, info_grad, 0, info_b, grad_b)
            count += 1
        failed = call_gemm(driver, args, count, threads()) != 0
    if failed:
        delete_if(grad_a)
        delete_if(grad_b)
        forward_pair_to(stack, backward_in_python())
        return
    delete_all(stack, 3)
    delete_list(mask)
    put(stack, 0, optional(grad_a))
    put(stack, 1, optional(grad_b))


def mm_backward_autograd(stack, inputs, outputs):
    """The Autograd key of ``mm_backward``."""
    if is_direct(stack, 3, get(state(), PLAIN_KEYS)):
        linked_backward(stack, inputs, outputs)
    else:
        forward_pair_to(stack, backward_in_python())


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_own": (own, OWN_SIGNATURE),
    **{f"matmul_grad_{op.name}": (make_entry(op), ENTRY_SIGNATURE) for op in OWN},
    **{f"matmul_grad_{op.name}_autograd": (make_autograd_entry(op), ENTRY_SIGNATURE) for op in OWN},
    "matmul_grad_mm_backward": (mm_backward, ENTRY_SIGNATURE),
    "matmul_grad_mm_backward_autograd": (mm_backward_autograd, ENTRY_SIGNATURE),
}
