"""The boxed entry points that torch's dispatcher calls: no Python between the caller and the microkernel.

Signature, from torch's stable C ABI: ``void entry(uint64* stack, uint64 inputs, uint64 outputs)``. The inputs
are tensor handles that the entry owns and must delete; the outputs take their place on the stack. A function
that fails returns non-zero and keeps its message for the thread.
"""

from __future__ import annotations

from numba.core import types

from .job import MOST, single
from .memory import INT64, call_address, get, jit, print_four, put, stack_words, text
from .product import A_CS, A_RS, B_CS, B_RS, PRODUCT, A, B, C, K, M, N
from .shims import (
    DATA,
    DIM,
    DTYPE,
    answer,
    call_dispatcher,
    check_fail,
    data_of,
    delete_list,
    delete_tensor,
    describe,
    driver_of,
    empty,
    exclude_key,
    facts,
    fail,
    forward_to,
    is_strided,
    key_included,
    list_item,
    needs_gradient,
    new,
    no_overload,
    size,
    state,
    strict_message,
    stride,
    threads,
    unknown_error,
    word,
)
from .state import (
    ABI_VERSION,
    AUTOGRAD_KEY,
    FUNCTIONALIZE_KEY,
    FUNCTORCH_KEY,
    KEYS_AT,
    NOT_ACCELERATED,
    PLAIN_KEYS,
    PYTHON_KEY,
    STRICT,
)

ENTRY_SIGNATURE = types.void(INT64, INT64, INT64)

self_not_matrix = text("self must be a matrix")
mat2_not_matrix = text("mat2 must be a matrix")
shapes_format = text("mat1 and mat2 shapes cannot be multiplied (%lldx%lld and %lldx%lld)")
out_of_memory = text("matmul_grad: the packing buffers cannot be allocated")
aten_mm, mm_name, mm_in_python = (text(name) for name in ("aten::mm", "matmul_grad::mm", "matmul_grad::_mm_in_python"))
backward_name, backward_in_python = (
    text(name) for name in ("matmul_grad::mm_backward", "matmul_grad::_mm_backward_in_python")
)

buffer = stack_words(32)
products = stack_words(MOST * PRODUCT)
call_gemm = call_address(3)
linked_mm, linked_backward = (
    types.ExternalFunction(f"matmul_grad_{name}", ENTRY_SIGNATURE) for name in ("mm", "mm_backward")
)


@jit
def reject(a, b, message):
    """Leave with torch's RuntimeError. It unwinds through this frame: what is owned is deleted before."""
    delete_tensor(a)
    delete_tensor(b)
    check_fail(unknown_error(), unknown_error(), 0, message)


@jit
def validate(a, b, about_a, about_b):
    """torch.mm's own errors, in its own order."""
    if get(about_a, DIM) != 2:
        reject(a, b, self_not_matrix())
    if get(about_b, DIM) != 2:
        reject(a, b, mat2_not_matrix())
    if size(about_a, 1) != size(about_b, 0):
        message = buffer()
        sizes = size(about_a, 0), size(about_a, 1), size(about_b, 0), size(about_b, 1)
        print_four(message, 256, shapes_format(), *sizes)
        reject(a, b, message)


@jit
def put_product(words, about_a, turned_a, about_b, turned_b, out):
    """A product of two described matrices, or of their transposes, into ``out``."""
    put(words, M, size(about_a, turned_a))
    put(words, K, size(about_a, 1 - turned_a))
    put(words, N, size(about_b, 1 - turned_b))
    put(words, A, get(about_a, DATA))
    put(words, A_RS, stride(about_a, turned_a))
    put(words, A_CS, stride(about_a, 1 - turned_a))
    put(words, B, get(about_b, DATA))
    put(words, B_RS, stride(about_b, turned_b))
    put(words, B_CS, stride(about_b, 1 - turned_b))
    put(words, C, data_of(out))
    single(words, size(about_b, 1 - turned_b))


def mm(stack, inputs, outputs):
    """``matmul_grad::mm(Tensor self, Tensor mat2) -> Tensor`` for dense CPU tensors."""
    a, b, about_a, about_b = get(stack, 0), get(stack, 1), facts(), facts()
    driver = NOT_ACCELERATED
    if describe(a, about_a) and describe(b, about_b):
        validate(a, b, about_a, about_b)
        if word(about_a + 8 * DTYPE) == word(about_b + 8 * DTYPE):
            driver = driver_of(word(about_a + 8 * DTYPE))
    if driver == NOT_ACCELERATED:
        if get(state(), STRICT) != 0:
            reject(a, b, strict_message())
        forward_to(stack, aten_mm())
        return
    out = empty(size(about_a, 0), size(about_b, 1), word(about_a + 8 * DTYPE))
    if out == 0:
        delete_tensor(a)
        delete_tensor(b)
        fail()
    words = products()
    put_product(words, about_a, 0, about_b, 0, out)
    if call_gemm(driver, words, 1, threads()) != 0:
        delete_tensor(out)
        reject(a, b, out_of_memory())
    delete_tensor(a)
    delete_tensor(b)
    put(stack, 0, out)


@jit
def backward_driver(grad, a, b, about_grad, about_a, about_b):
    """The driver for both gradients, or NOT_ACCELERATED: then the operator in Python finds what is wrong, if it is."""
    if not (describe(grad, about_grad) and describe(a, about_a) and describe(b, about_b)):
        return NOT_ACCELERATED
    if get(about_grad, DIM) != 2 or get(about_a, DIM) != 2 or get(about_b, DIM) != 2:
        return NOT_ACCELERATED
    if size(about_a, 0) != size(about_grad, 0) or size(about_b, 1) != size(about_grad, 1):
        return NOT_ACCELERATED
    dtype = word(about_a + 8 * DTYPE)
    if size(about_a, 1) != size(about_b, 0) or dtype != word(about_b + 8 * DTYPE):
        return NOT_ACCELERATED
    return driver_of(dtype) if dtype == word(about_grad + 8 * DTYPE) else NOT_ACCELERATED


@jit
def is_wanted(mask, index):
    at = answer()
    list_item(mask, index, at)
    return (get(at, 0) & 0xFF) != 0


@jit
def optional(tensor):
    """How the C ABI hands over a ``Tensor?``: nothing, or the address of a handle that torch frees."""
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
    """``matmul_grad::mm_backward``: both gradients in one call of the driver, for dense CPU tensors."""
    grad, a, b, mask = get(stack, 0), get(stack, 1), get(stack, 2), get(stack, 3)
    about_grad, about_a, about_b = facts(), facts(), facts()
    driver = backward_driver(grad, a, b, about_grad, about_a, about_b)
    if driver == NOT_ACCELERATED:
        forward_to(stack, backward_in_python())
        return
    dtype, words, count = word(about_a + 8 * DTYPE), products(), 0
    wants_a, wants_b = is_wanted(mask, 0), is_wanted(mask, 1)
    grad_a = empty(size(about_a, 0), size(about_a, 1), dtype) if wants_a else 0
    grad_b = empty(size(about_b, 0), size(about_b, 1), dtype) if wants_b else 0
    failed, out_of = (wants_a and grad_a == 0) or (wants_b and grad_b == 0), False
    if not failed:
        if wants_a:
            put_product(words, about_grad, 0, about_b, 1, grad_a)
            count += 1
        if wants_b:
            put_product(words + 8 * PRODUCT * count, about_a, 1, about_grad, 0, grad_b)
            count += 1
        out_of = call_gemm(driver, words, count, threads()) != 0
    delete_tensor(grad)
    delete_list(mask)
    if failed or out_of:
        delete_if(grad_a)
        delete_if(grad_b)
        if out_of:
            reject(a, b, out_of_memory())
        delete_tensor(a)
        delete_tensor(b)
        fail()
    delete_tensor(a)
    delete_tensor(b)
    put(stack, 0, optional(grad_a))
    put(stack, 1, optional(grad_b))


@jit
def dispatch_below_autograd(stack, name):
    """Dispatch again rather than compute: keys below autograd (subclasses, functionalisation) must have their turn."""
    key = get(state(), AUTOGRAD_KEY)
    exclude_key(key, 1)
    failed = call_dispatcher(name, no_overload(), stack, get(state(), ABI_VERSION))
    exclude_key(key, 0)
    if failed != 0:
        fail()


@jit
def is_direct(tensors, count, plain):
    """No graph to record, and nothing between autograd and the device that must have its turn.

    That is so without a mode, for tensors whose dispatch keys are those of an ordinary one, ``plain``.
    """
    place = get(state(), KEYS_AT)
    for index in range(count):
        if get(get(get(tensors, index), 0), place) != plain or needs_gradient(get(tensors, index)):
            return False
    modes = key_included(get(state(), PYTHON_KEY)) | key_included(get(state(), FUNCTORCH_KEY))
    return modes | key_included(get(state(), FUNCTIONALIZE_KEY)) == 0


@jit
def is_python(tensors, count):
    """A graph to record, a Python mode or another layout: autograd.py's affair.

    Sizes are not looked at: that would make a tracer take symbolic ones for constants.
    """
    if key_included(get(state(), PYTHON_KEY)) != 0:
        return True
    for index in range(count):  # noqa: SIM110 (Numba takes no generator)
        if not is_strided(get(tensors, index)) or needs_gradient(get(tensors, index)):
            return True
    return False


def mm_autograd(stack, inputs, outputs):
    """The Autograd key of ``mm``."""
    if is_direct(stack, 2, get(state(), PLAIN_KEYS)):
        linked_mm(stack, inputs, outputs)
    elif is_python(stack, 2):
        forward_to(stack, mm_in_python())
    else:
        dispatch_below_autograd(stack, mm_name())


def mm_backward_autograd(stack, inputs, outputs):
    """The Autograd key of ``mm_backward``."""
    if is_direct(stack, 3, get(state(), PLAIN_KEYS)):
        linked_backward(stack, inputs, outputs)
    elif is_python(stack, 3):
        forward_to(stack, backward_in_python())
    else:
        dispatch_below_autograd(stack, backward_name())


KERNELS = {
    f"matmul_grad_{entry.__name__}": (entry, ENTRY_SIGNATURE)
    for entry in (mm, mm_autograd, mm_backward, mm_backward_autograd)
}
