"""The entry points of ``matmul_grad::bmm``, ``addmm`` and ``baddbmm``, as ``torch_abi.py`` has those of ``mm``.

The scales are float64 in the schema, since torch's stable C ABI carries no Scalar. So a sum that goes to torch's own
kernel goes by an operator in Python, which knows what torch takes.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from .call import NOT_OURS, OURS, TORCHS_TO_SAY, allocate, fit, is_empty, put_input, put_operands, weighed
from .memory import INT64, call_address, get, jit, put, stack_words, text
from .product import ALPHA, BETA, PRODUCT
from .shims import (
    DTYPE,
    check_fail,
    delete_tensor,
    describe,
    driver_of,
    facts,
    fail,
    forward_to,
    state,
    strict_message,
    threads,
    unknown_error,
    word,
)
from .state import NOT_ACCELERATED, STRICT
from .torch_abi import ENTRY_SIGNATURE, dispatch_below_autograd, is_python, out_of_memory

# Batches or not, and whether something is added; who takes what is not for these kernels.
OPERATORS = {
    "bmm": (3, 0, "aten::bmm"),
    "addmm": (2, 1, "matmul_grad::_addmm_by_torch"),
    "baddbmm": (3, 1, "matmul_grad::_baddbmm_by_torch"),
}
PRODUCT_SIGNATURE = INT64(INT64, INT64, INT64)

linked_product = types.ExternalFunction("matmul_grad_product", PRODUCT_SIGNATURE)
call_gemm = call_address(3)
product_words = stack_words(PRODUCT)


@jit
def look(stack, words, about_a, about_b, about_input, rank, adds):
    """Describe the call in ``words``; what is to become of it."""
    if not describe(get(stack, adds), about_a) or not describe(get(stack, adds + 1), about_b):
        return TORCHS_TO_SAY
    if not fit(about_a, about_b, rank):
        return TORCHS_TO_SAY
    dtype = word(about_a + 8 * DTYPE)
    if driver_of(dtype) == NOT_ACCELERATED:
        return NOT_OURS
    put_operands(words, about_a, about_b, rank)
    if is_empty(words):
        return TORCHS_TO_SAY
    if adds == 0:
        return OURS
    known = describe(get(stack, 0), about_input) and word(about_input + 8 * DTYPE) == dtype
    if not known or not put_input(words, about_input, rank):
        return TORCHS_TO_SAY
    put(words, BETA, get(stack, 3))
    put(words, ALPHA, get(stack, 4))
    return weighed(words, dtype)


@jit
def delete_all(stack, count):
    for index in range(count):
        delete_tensor(get(stack, index))


def product(stack, rank, adds):
    """The product that the stack describes, or 0: then torch's own kernel is to take the stack as it is."""
    about_a, about_b, about_input, words = facts(), facts(), facts(), product_words()
    outcome = look(stack, words, about_a, about_b, about_input, rank, adds)
    if outcome != OURS:
        if outcome == NOT_OURS and get(state(), STRICT) != 0:
            delete_all(stack, 2 + adds)
            check_fail(unknown_error(), unknown_error(), 0, strict_message())
        return 0
    dtype = word(about_a + 8 * DTYPE)
    out = allocate(words, dtype, rank)
    if out == 0:
        delete_all(stack, 2 + adds)
        fail()
    failed = call_gemm(driver_of(dtype), words, 1, threads()) != 0
    delete_all(stack, 2 + adds)
    if failed:
        delete_tensor(out)
        check_fail(unknown_error(), unknown_error(), 0, out_of_memory())
    put(stack, 0, out)
    return 1


def make_entry(name: str) -> Callable:
    """The CPU key of one of OPERATORS.

    C = A · B, or beta · input + alpha · (A · B)

    shapes      a (m, k), b (k, n), input any that expands to (m, n); bmm, baddbmm: with one more size in front
    strides     any; the result is contiguous
    dtypes      one for all, with a kernel; torch's own kernel takes what has none
    aliasing    the result is new memory
    rounding    as the driver's
    errors      torch's own kernel raises them
    determinism as the driver's
    source      docs/design.md, "Functions and modules"
    """
    rank, adds, others = OPERATORS[name]
    torchs = text(others)

    def entry(stack, inputs, outputs):
        if linked_product(stack, rank, adds) == 0:
            forward_to(stack, torchs())

    return entry


def make_autograd_entry(name: str) -> Callable:
    """The Autograd key of one of OPERATORS."""
    tensors = 2 + OPERATORS[name][1]
    below, in_python = text(f"matmul_grad::{name}"), text(f"matmul_grad::_{name}_in_python")

    def entry(stack, inputs, outputs):
        if is_python(stack, tensors):
            forward_to(stack, in_python())
        else:
            dispatch_below_autograd(stack, below())

    return entry


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_product": (product, PRODUCT_SIGNATURE),
    **{f"matmul_grad_{name}": (make_entry(name), ENTRY_SIGNATURE) for name in OPERATORS},
    **{f"matmul_grad_{name}_autograd": (make_autograd_entry(name), ENTRY_SIGNATURE) for name in OPERATORS},
}
