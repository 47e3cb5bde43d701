"""aten's own products on CPU: what torch's dispatcher calls in place of torch's kernels while the switch is on.

Signature, torch's own of a boxed kernel: ``void entry(functor, operator, keys, stack)``. The stack is a C++ vector of
16-byte slots, a payload and a tag; the last of them are the arguments. A slot that holds a tensor starts with the word
that a handle of the stable C ABI points at, so its address serves as one. Nothing is taken off the stack before the
product is done: until then torch's own kernel can still be called on it, and says in its words what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from .call import (
    FLOAT32,
    FLOAT64,
    NOT_OURS,
    OURS,
    TORCHS_TO_SAY,
    allocate,
    fit,
    is_empty,
    last,
    last_stride,
    put_input,
    put_operands,
    put_sizes,
    shape_words,
    weighed,
)
from .memory import INT64, bits_of, call_address, get, jit, next_number, put, stack_words, text
from .product import (
    ALPHA,
    BATCH,
    BETA,
    C_BS,
    C_CS,
    C_RS,
    I_BS,
    I_CS,
    I_RS,
    INPUT,
    PRODUCT,
    C,
    M,
    N,
)
from .shims import (
    DATA,
    DIM,
    DTYPE,
    answer,
    check_fail,
    delete_library,
    delete_tensor,
    describe,
    driver_of,
    facts,
    init_impl,
    library_impl,
    new,
    resize_output,
    size,
    state,
    strict_message,
    stride,
    threads,
    unknown_error,
    word,
)
from .state import (
    ACCELERATED,
    CODES,
    COUNTS,
    HANDED_OVER,
    NOT_ACCELERATED,
    OPERATORS,
    OVERLOADS,
    STRICT,
    SWITCH,
    TORCHS,
    entry_name,
)

BOXED_SIGNATURE = types.void(*[INT64] * 4)
PRODUCT_SIGNATURE = types.void(*[INT64] * 8)
SLOT = 16
NONE, DOUBLE, INT = 0, 3, 5  # tags of c10::IValue

NEW, OUT, IN_PLACE = range(3)  # where the result goes

linked_product = types.ExternalFunction("matmul_grad_aten_product", PRODUCT_SIGNATURE)
call_gemm = call_address(3)
call_boxed = call_address(4)
product_words = stack_words(PRODUCT)
handle_word = stack_words(1)
aten, cpu, matmul_grad = (text(name) for name in ("aten", "CPU", "matmul_grad"))


@jit
def number(slot, target):
    """Write the bits of the float64 that a Scalar is; False where it is complex, a bool or a symbol."""
    tag = word(slot + 8)
    if tag == DOUBLE:
        put(target, 0, get(slot, 0))
    elif tag == INT:
        put(target, 0, bits_of(float(get(slot, 0))))
    return tag in (DOUBLE, INT)


@jit
def added(slots, words, about, dtype, rank):
    """Read input, beta and alpha of an addmm into ``words``; what is to become of it."""
    if not describe(slots, about) or word(about + 8 * DTYPE) != dtype or not put_input(words, about, rank):
        return TORCHS_TO_SAY
    if not number(slots + 3 * SLOT, words + 8 * BETA) or not number(slots + 4 * SLOT, words + 8 * ALPHA):
        return NOT_OURS
    return weighed(words, dtype)


@jit
def sizes_agree(words, about, rank):
    if get(about, DIM) != rank or last(about, 0, rank) != get(words, BATCH):
        return False
    return last(about, 1, rank) == get(words, M) and last(about, 2, rank) == get(words, N)


@jit
def reach(about):
    """How many elements lie between the first and the last of a tensor."""
    distance = 0
    for dim in range(get(about, DIM)):
        distance += (size(about, dim) - 1) * stride(about, dim)
    return distance


@jit
def overlap(about, other, item):
    """Whether the memory between first and last element of two tensors meets; both have elements."""
    start, other_start = get(about, DATA), get(other, DATA)
    end = start + (reach(about) + 1) * item
    other_end = other_start + (reach(other) + 1) * item
    return start < other_end and other_start < end


@jit
def is_spread(about):
    """Whether no two elements share a place: each stride steps over all that the smaller ones reach."""
    for dim in range(get(about, DIM)):
        step, covered = stride(about, dim), 0
        for other in range(get(about, DIM)):
            if other != dim and stride(about, other) <= step:
                covered += (size(about, other) - 1) * stride(about, other)
        if size(about, dim) > 1 and step <= covered:
            return False
    return True


@jit
def put_result(words, address, about, rank):
    put(words, C, address)
    put(words, C_BS, last_stride(about, 0, rank))
    put(words, C_RS, last_stride(about, 1, rank))
    put(words, C_CS, last_stride(about, 2, rank))


@jit
def is_result(words):
    """Whether what is added is the result itself, element for element."""
    same = get(words, INPUT) == get(words, C) and get(words, I_RS) == get(words, C_RS)
    return same and get(words, I_CS) == get(words, C_CS) and get(words, I_BS) == get(words, C_BS)


@jit
def written_to(out, words, about, about_a, about_b, about_input, dtype, rank, resizes):
    """Describe the tensor to write to and whether we may; torch resizes it, with a warning, where its sizes differ."""
    if not describe(out, about) or word(about + 8 * DTYPE) != dtype:
        return TORCHS_TO_SAY
    if not sizes_agree(words, about, rank):
        if not resizes:
            return TORCHS_TO_SAY
        sizes = shape_words()
        put_sizes(words, sizes, rank)
        resize_output(out, sizes, rank)
        describe(out, about)
    put_result(words, get(about, DATA), about, rank)
    item = 8 if dtype == FLOAT64 else 4 if dtype == FLOAT32 else 2
    if not is_spread(about) or overlap(about, about_a, item) or overlap(about, about_b, item):
        return NOT_OURS
    if get(words, INPUT) != 0 and not is_result(words) and overlap(about, about_input, item):
        return NOT_OURS
    return OURS


@jit
def drop(slot):
    """Give back the tensor in a slot: a handle takes it over and is deleted."""
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


@jit
def count(operator, dtype, outcome):
    if dtype < CODES:
        next_number(state(), COUNTS + (operator * CODES + dtype) * 2 + outcome)


@jit
def look(slots, words, about_a, about_b, about_input, about_out, rank, adds, result):
    """Describe the call in ``words``; what is to become of it."""
    a = slots + SLOT * adds
    if not describe(a, about_a) or not describe(a + SLOT, about_b) or not fit(about_a, about_b, rank):
        return TORCHS_TO_SAY
    dtype = word(about_a + 8 * DTYPE)
    if driver_of(dtype) == NOT_ACCELERATED:
        return NOT_OURS
    put_operands(words, about_a, about_b, rank)
    if is_empty(words):
        return TORCHS_TO_SAY
    if adds:
        outcome = added(slots, words, about_input, dtype, rank)
        if outcome != OURS:
            return outcome
    if result == NEW:
        return OURS
    out = slots if result == IN_PLACE else a + 2 * SLOT + 2 * SLOT * adds
    return written_to(out, words, about_out, about_a, about_b, about_input, dtype, rank, result == OUT)


@jit
def multiply(words, dtype, rank, result, handle):
    """The product; True where it is done, and then ``handle`` holds a new result's."""
    put(handle, 0, 0)
    if result == NEW:
        put(handle, 0, allocate(words, dtype, rank))
        if get(handle, 0) == 0:
            return False
    done = call_gemm(driver_of(dtype), words, 1, threads()) == 0
    if not done and result == NEW:
        delete_tensor(get(handle, 0))
    return done


@jit
def leave(slots, stack, adds, result, handle):
    """The result takes the first slot of the stack, and the arguments go."""
    end = get(stack, 1)
    if result == NEW:
        exchange_tensors(slots, handle)
        delete_tensor(handle)
    elif result == OUT:
        exchange_tensors(slots, end - SLOT)
    drop(slots + SLOT)
    if adds:
        drop(slots + 2 * SLOT)  # what stands behind it, beta and alpha, owns nothing
    if result == OUT:
        drop(end - SLOT)
    put(stack, 1, slots + SLOT)


def product(operator_handle, keys, stack, overload, operator, rank, adds, result):
    """What every entry calls, with the facts about it that are its own."""
    slots, words = get(stack, 1) - SLOT * (2 + 3 * adds + (result == OUT)), product_words()
    about_a, about_b, about_input, about_out, handle = facts(), facts(), facts(), facts(), handle_word()
    outcome = look(slots, words, about_a, about_b, about_input, about_out, rank, adds, result)
    dtype = word(about_a + 8 * DTYPE)
    if outcome == OURS:
        if multiply(words, dtype, rank, result, handle):
            count(operator, dtype, ACCELERATED)
            leave(slots, stack, adds, result, get(handle, 0))
            return
        outcome = NOT_OURS
    if outcome == NOT_OURS:
        if get(state(), STRICT) != 0:
            check_fail(unknown_error(), unknown_error(), 0, strict_message())
        count(operator, dtype, HANDED_OVER)
    at = TORCHS + 2 * overload
    call_boxed(get(state(), at), get(state(), at + 1), operator_handle, keys, stack)


def make_entry(name: str) -> Callable:
    """The entry for one of OVERLOADS.

    C = A · B, or alpha · (A · B) + beta · input

    shapes      a (m, k), b (k, n), input any that expands to (m, n); bmm, baddbmm: with one more size in front
    strides     any; the result is contiguous, or has those of ``out``
    dtypes      one for all, with a kernel; torch's own kernel takes what has none
    aliasing    an ``out`` that shares memory with an operand, or with itself, is torch's own kernel's affair
    rounding    as the driver's
    errors      torch's own kernel raises them
    determinism as the driver's
    source      docs/design.md, "The switch"
    """
    overload, operator = OVERLOADS.index(name), OPERATORS.index(name.rstrip("_").removesuffix(".out"))
    rank, adds = 3 if "bmm" in name else 2, int("add" in name)
    result = OUT if name.endswith(".out") else IN_PLACE if name.endswith("_") else NEW

    def entry(functor, operator_handle, keys, stack):
        linked_product(operator_handle, keys, stack, overload, operator, rank, adds, result)

    return entry


def take_over(table):
    """Put a kernel under each name of ``table`` (count, then name and kernel by turns).

    One call, so that no signal of Python's finds the half of it done.
    """
    library = answer()
    if init_impl(aten(), cpu(), matmul_grad(), 0, library) != 0:
        return 1
    for index in range(get(table, 0)):
        library_impl(get(library, 0), get(table, 1 + 2 * index), get(table, 2 + 2 * index), 0)
    put(state(), SWITCH, get(library, 0))
    return 0


def give_back():
    """Take away what ``take_over`` has put there."""
    library = get(state(), SWITCH)
    put(state(), SWITCH, 0)
    return delete_library(library)


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_aten_product": (product, PRODUCT_SIGNATURE),
    **{entry_name(name): (make_entry(name), BOXED_SIGNATURE) for name in OVERLOADS},
    "matmul_grad_take_over": (take_over, INT64(INT64)),
    "matmul_grad_give_back": (give_back, INT64()),
}
