"""What a call is about, in the words of a product: what the entries of both sets of operators share.

``rank`` is 2 for matrices and 3 for batches of them.
"""

from __future__ import annotations

from .memory import get, jit, number_of, put, stack_words
from .product import (
    A_BS,
    A_CS,
    A_RS,
    ALPHA,
    B_BS,
    B_CS,
    B_RS,
    BATCH,
    BETA,
    C_BS,
    C_CS,
    C_RS,
    I_BS,
    I_CS,
    I_RS,
    INPUT,
    ONE,
    A,
    B,
    C,
    K,
    M,
    N,
)
from .shims import DATA, DIM, DTYPE, answer, data_of, empty_strided, size, stride, word
from .state import DTYPE_CODES

# What is to become of a call: a product of ours; torch's own kernel, since there is nothing to multiply or something
# is wrong; torch's own kernel, since ours do not take it.
OURS, TORCHS_TO_SAY, NOT_OURS = range(3)

LARGEST = 3.4028234663852886e38  # of float32: torch refuses a larger alpha or beta, unless the product is in float64
FLOAT32, FLOAT64 = DTYPE_CODES["float32"], DTYPE_CODES["float64"]

shape_words = stack_words(6)


@jit
def last(about, dim, rank):
    """Size of dimension ``dim`` of ``rank``, counted so that a batch comes first; 1 where there is no such one."""
    index = dim - 3 + rank
    return size(about, index) if index >= 0 else 1


@jit
def last_stride(about, dim, rank):
    index = dim - 3 + rank
    return stride(about, index) if index >= 0 else 0


@jit
def fit(about_a, about_b, rank):
    """Two (batches of) matrices of one dtype whose sizes agree: torch says what is wrong with any others."""
    if get(about_a, DIM) != rank or get(about_b, DIM) != rank or word(about_a + 8 * DTYPE) != word(about_b + 8 * DTYPE):
        return False
    return last(about_a, 0, rank) == last(about_b, 0, rank) and last(about_a, 2, rank) == last(about_b, 1, rank)


@jit
def put_operands(words, about_a, about_b, rank):
    put(words, BATCH, last(about_a, 0, rank))
    put(words, M, last(about_a, 1, rank))
    put(words, K, last(about_a, 2, rank))
    put(words, N, last(about_b, 2, rank))
    put(words, A, get(about_a, DATA))
    put(words, A_BS, last_stride(about_a, 0, rank))
    put(words, A_RS, last_stride(about_a, 1, rank))
    put(words, A_CS, last_stride(about_a, 2, rank))
    put(words, B, get(about_b, DATA))
    put(words, B_BS, last_stride(about_b, 0, rank))
    put(words, B_RS, last_stride(about_b, 1, rank))
    put(words, B_CS, last_stride(about_b, 2, rank))
    put(words, INPUT, 0)
    put(words, ALPHA, ONE)


@jit
def is_empty(words):
    """Whether there is nothing to multiply."""
    return get(words, M) == 0 or get(words, N) == 0 or get(words, K) == 0 or get(words, BATCH) == 0


@jit
def is_too_large(bits, dtype):
    return dtype != FLOAT64 and LARGEST < abs(number_of(bits)) < float("inf")


@jit
def expanded_stride(about, from_end, wanted):
    """Stride of a dimension expanded to ``wanted``; -1 where it cannot be."""
    index = get(about, DIM) - 1 - from_end
    if index < 0:
        return 0
    if size(about, index) == wanted:
        return stride(about, index)
    return 0 if size(about, index) == 1 else -1


@jit
def put_input(words, about, rank):
    """Describe what is added; False where it cannot be expanded to the result."""
    put(words, INPUT, get(about, DATA))
    put(words, I_CS, expanded_stride(about, 0, get(words, N)))
    put(words, I_RS, expanded_stride(about, 1, get(words, M)))
    put(words, I_BS, expanded_stride(about, 2, get(words, BATCH)))
    return get(about, DIM) <= rank and min(get(words, I_CS), get(words, I_RS), get(words, I_BS)) >= 0


@jit
def weighed(words, dtype):
    """What is to become of a sum with these beta and alpha; input is left out where beta is 0."""
    beta, alpha = get(words, BETA), get(words, ALPHA)
    if is_too_large(beta, dtype) or is_too_large(alpha, dtype) or number_of(alpha) == 0.0:
        return TORCHS_TO_SAY  # alpha = 0 leaves the product out, even where it is NaN
    if number_of(beta) == 0.0:
        put(words, INPUT, 0)
    return OURS


@jit
def put_sizes(words, target, rank):
    """Sizes of the result; behind three words, its strides if it is contiguous."""
    m, n, at = get(words, M), get(words, N), target
    if rank == 3:
        put(target, 0, get(words, BATCH))
        put(target, 3, m * n)
        at = target + 8
    put(at, 0, m)
    put(at, 1, n)
    put(at, 3, n)
    put(at, 4, 1)


@jit
def allocate(words, dtype, rank):
    """A handle of a new contiguous result; 0 where torch has no memory for it."""
    sizes, handle = shape_words(), answer()
    put_sizes(words, sizes, rank)
    if empty_strided(rank, sizes, sizes + 8 * 3, dtype, 0, 0, handle) != 0:
        return 0
    put(words, C, data_of(get(handle, 0)))
    put(words, C_BS, get(words, M) * get(words, N))
    put(words, C_RS, get(words, N))
    put(words, C_CS, 1)
    return get(handle, 0)
