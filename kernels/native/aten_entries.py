"""Kernels under aten's own operators on CPU, while ``matmul_grad.enable()`` overrides them.

Signature, torch's of a boxed kernel: ``void entry(functor, operator, keys, stack)``. The stack is a C++ vector of
slots (``torch_layout.SLOT``), a payload and a tag; the last of them are the arguments. A slot that holds a tensor
starts with the word that a handle of the stable C ABI points at, so its address serves as one. Nothing is taken off the
stack before the product is done: until then PyTorch's kernel can still be called on it, and raises its errors.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.gemm_args import ALPHA, BETA, GEMM_ARGS
from ..cpu.memory import INT64, bits_of, call_address, fetch_increment, get, jit, put, stack_words, text
from .call import DTYPE, HANDLE, IN_PLACE, NEW, OUT, RUN, UNSUPPORTED, linked_compute, set_tensors, tensor_words
from .call_out import linked_compute_out
from .graph_entries import is_kept_otherwise, is_ordinary
from .op_table import ABOVE_AUTOGRAD, OVERLOADS, op_of
from .own_entries import is_error, is_without_modes, raise_for
from .state import (
    ABOVE,
    ABOVE_LIBRARY,
    ACCELERATED,
    ACTIVE,
    CODES,
    FALLBACKS,
    HANDED_OVER,
    OPERATORS,
    OVERRIDE,
    autograd_entry_name,
    count_at,
    entry_name,
)
from .torch_c_api import delete_library, delete_tensor, grad_mode, init_impl, library_impl, new, out_param, state, word
from .torch_layout import DOUBLE, INT, NONE, SLOT

BOXED_SIGNATURE = types.void(*[INT64] * 4)
MULTIPLY_SIGNATURE = types.void(*[INT64] * 8)

linked_multiply = types.ExternalFunction("matmul_grad_aten_multiply", MULTIPLY_SIGNATURE)
call_boxed = call_address(4)
args_words = stack_words(GEMM_ARGS)
cpu, autograd_cpu, matmul_grad = text("CPU"), text("AutogradCPU"), text("matmul_grad")


@jit
def number(slot, target):
    """Write the bits of a Scalar as float64; False where it is complex, a bool or a symbol."""
    tag = word(slot + 8)
    if tag == DOUBLE:
        put(target, 0, get(slot, 0))
    elif tag == INT:
        put(target, 0, bits_of(float(get(slot, 0))))
    return tag in (DOUBLE, INT)


@jit
def drop(slot):
    """Release the tensor in a slot: it moves to a handle, which is deleted."""
    handle = new(8)
    put(handle, 0, get(slot, 0))
    put(slot, 0, 0)
    put(slot, 1, NONE)
    delete_tensor(handle)


@jit
def exchange_tensors(slot, other):
    kept = get(slot, 0)
    put(slot, 0, get(other, 0))
    put(other, 0, kept)


word_of = jit(count_at)


@jit
def count(operator, dtype, outcome):
    if dtype < CODES:
        fetch_increment(state(), word_of(operator, dtype, outcome))


@jit
def put_on_stack(slots, stack, has_addend, result, handle):
    """Put the result into the first slot of the stack, and remove the arguments."""
    end = get(stack, 1)
    if result == NEW:
        exchange_tensors(slots, handle)
        delete_tensor(handle)
    elif result == OUT:
        exchange_tensors(slots, end - SLOT)
    drop(slots + SLOT)
    if has_addend:
        drop(slots + 2 * SLOT)  # beta and alpha, behind it, own nothing
    if result == OUT:
        drop(end - SLOT)
    put(stack, 1, slots + SLOT)


def multiply(operator_handle, keys, stack, overload, operator, kind, has_addend, result):
    """The body of every entry, with the constants of its overload."""
    at = FALLBACKS + 2 * overload
    if get(state(), ACTIVE) == 0:
        call_boxed(get(state(), at), get(state(), at + 1), operator_handle, keys, stack)
        return
    end = get(stack, 1)
    slots = end - SLOT * (2 + 3 * has_addend + (result == OUT))
    args, tensors, returned = args_words(), tensor_words(), out_param()
    a, source, has_scales = slots + SLOT * has_addend, 0, True
    if has_addend != 0:
        source = slots
        has_scales = number(slots + 3 * SLOT, args + 8 * BETA) and number(slots + 4 * SLOT, args + 8 * ALPHA)
    out = 0 if result == NEW else slots if result == IN_PLACE else end - SLOT
    set_tensors(tensors, a, a + SLOT, source, out)
    if result == NEW:
        outcome = linked_compute(tensors, args, kind, has_scales, returned)
    else:
        outcome = linked_compute_out(tensors, args, kind, result, has_scales, returned)
    if outcome == RUN:
        count(operator, get(returned, DTYPE), ACCELERATED)
        put_on_stack(slots, stack, has_addend, result, get(returned, HANDLE))
        return
    if is_error(outcome):
        raise_for(outcome)
    if outcome == UNSUPPORTED:
        count(operator, get(returned, DTYPE), HANDED_OVER)
    call_boxed(get(state(), at), get(state(), at + 1), operator_handle, keys, stack)


def make_entry(name: str) -> Callable:
    """The entry for one of OVERLOADS.

    C = A · B, or alpha · (A · B) + beta · input

    shapes      a (m, k), b (k, n), input any that expands to (m, n); bmm, baddbmm: with one more size in front;
                addmv: b (k), the result (m); dot, vdot: a and b (k)
    strides     any; the result is contiguous, or has those of ``out``
    dtypes      one for all, with a kernel; others fall back to PyTorch's kernel
    aliasing    an ``out`` that shares memory with an operand is written from a temporary; one whose elements overlap,
                or that overlaps an addend of other strides, falls back to PyTorch's kernel
    rounding    as the driver's
    errors      PyTorch's kernel raises them
    determinism as the driver's
    source      docs/design.md, "The switch"
    """
    op, overload = op_of(name), OVERLOADS.index(name)
    operator, kind, has_addend = OPERATORS.index(op.name), op.kind, int(op.has_addend)
    result = OUT if name.endswith(".out") else IN_PLACE if name.endswith("_") else NEW

    def entry(functor, operator_handle, keys, stack):
        linked_multiply(operator_handle, keys, stack, overload, operator, kind, has_addend, result)

    return entry


@jit
def is_kept_apart(a, b):
    """Whether an operand's gradient is kept in another dtype, and autograd is all that follows the product."""
    if grad_mode() == 0 or not (is_kept_otherwise(a) or is_kept_otherwise(b)):
        return False
    return is_ordinary(a) and is_ordinary(b) and is_without_modes()


def make_autograd_entry(name: str) -> Callable:
    """The entry of one of ABOVE_AUTOGRAD under autograd: torch's kernel, or ours for operands that are kept apart."""
    at, (arguments, first) = ABOVE + 4 * list(ABOVE_AUTOGRAD).index(name), ABOVE_AUTOGRAD[name]

    def entry(functor, operator_handle, keys, stack):
        a, kernel = get(stack, 1) - SLOT * (arguments - first), at
        if get(state(), ACTIVE) != 0 and is_kept_apart(a, a + SLOT):
            kernel = at + 2
        call_boxed(get(state(), kernel), get(state(), kernel + 1), operator_handle, keys, stack)

    return entry


@jit
def register(entries, key):
    """Register ``entries``: a namespace, a count, then names and kernels in pairs. The library, or 0."""
    library = out_param()
    if init_impl(get(entries, 0), key, matmul_grad(), 0, library) != 0:
        return 0
    for index in range(get(entries, 1)):
        library_impl(get(library, 0), get(entries, 2 + 2 * index), get(entries, 3 + 2 * index), 0)
    return get(library, 0)


def install(entries, above):
    """Register ``entries`` for the CPU and, where they are not 0, those ``above`` autograd.

    One call, so that no signal of Python's interrupts it.
    """
    library = register(entries, cpu())
    if library == 0:
        return 1
    put(state(), ABOVE_LIBRARY, register(above, autograd_cpu()) if above != 0 else 0)
    put(state(), OVERRIDE, library)
    put(state(), ACTIVE, 1)
    return 0


def uninstall():
    """Remove what ``install`` has registered."""
    library, above = get(state(), OVERRIDE), get(state(), ABOVE_LIBRARY)
    put(state(), ACTIVE, 0)
    put(state(), OVERRIDE, 0)
    put(state(), ABOVE_LIBRARY, 0)
    if above != 0:
        delete_library(above)
    return delete_library(library)


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_aten_multiply": (multiply, MULTIPLY_SIGNATURE),
    **{entry_name(name): (make_entry(name), BOXED_SIGNATURE) for name in OVERLOADS},
    **{autograd_entry_name(name): (make_autograd_entry(name), BOXED_SIGNATURE) for name in ABOVE_AUTOGRAD},
    "matmul_grad_install": (install, INT64(INT64, INT64)),
    "matmul_grad_uninstall": (uninstall, INT64()),
}
